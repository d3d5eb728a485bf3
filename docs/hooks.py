"""A hook of mkdocs: on the site, show links to files outside docs/ as plain names."""

import re


def on_page_markdown(markdown, **_):
    """Return the page with ``[text](../path)`` replaced by its text."""
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", markdown)
