"""A hook of mkdocs: show links to files outside docs/, which lead somewhere in a checkout, as plain names on the site."""

import re


def on_page_markdown(markdown, **_):
    """Return the page with ``[text](../path)`` replaced by its text."""
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", markdown)
