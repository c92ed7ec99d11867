"""``python -m attnrb``, which launchers of several processes need: ``accelerate launch -m attnrb eval ...``."""

from attnrb.cli import main

main()
