"""What reports share: pages, files, and text fit to print."""
