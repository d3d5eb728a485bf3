"""``python -m dinov2_custom.embed``: what ``run/embed.py`` does."""

from dinov2_custom import entry
from dinov2_custom.run.embed import main

if __name__ == "__main__":
    entry.leave(entry.reported(main))
