"""The words of English that have a grammatical job rather than a meaning of their own: the closed word classes."""

from __future__ import annotations

_ARTICLES_AND_DETERMINERS = """
a an the this that these those each every either neither some any no all both half such what which whose
another other others enough several few fewer fewest little less least many much more most own same
"""

_PRONOUNS = """
i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers herself
it its itself they them their theirs themselves one ones oneself who whom whoever whomever whatever whichever
somebody someone something anybody anyone anything everybody everyone everything nobody none nothing
"""

_PREPOSITIONS = """
about above across after against along alongside amid among amongst around as at before behind below beneath beside
besides between beyond by despite down during except for from in inside into like near of off on onto out
outside over past per since than through throughout till to toward towards under underneath unlike until unto up
upon versus via with within without
"""

_CONJUNCTIONS = """
and or but nor so yet if unless because although though whereas while whether lest once
"""

_AUXILIARIES = """
be am is are was were been being have has had having do does did doing done will would shall should can could may might
must ought cannot
"""

_ADVERBS_AND_PARTICLES = """
not there here then thus hence when where why how whenever wherever however therefore moreover else also too very just
only even still again ever never always often quite rather
"""

_CONTRACTIONS = """
isn't aren't wasn't weren't haven't hasn't hadn't don't doesn't didn't won't wouldn't shan't shouldn't can't couldn't
mayn't mightn't mustn't oughtn't needn't i'm you're he's she's it's we're they're i've you've we've they've i'd you'd
he'd she'd it'd we'd they'd i'll you'll he'll she'll it'll we'll they'll that's who's what's there's here's where's
when's how's let's that'll there'll who'd
"""

FUNCTION_WORDS: frozenset[str] = frozenset(
    " ".join(
        (
            _ARTICLES_AND_DETERMINERS,
            _PRONOUNS,
            _PREPOSITIONS,
            _CONJUNCTIONS,
            _AUXILIARIES,
            _ADVERBS_AND_PARTICLES,
            _CONTRACTIONS,
        )
    ).split()
)
"""English function words, lower case, with a straight apostrophe."""
