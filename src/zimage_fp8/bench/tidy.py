"""JSON for people and for version control: what fits on a line stands on one.

A record has a thousand requests: one line each halves the file, and one that changed is one line.
"""

import json

from pydantic import JsonValue

LINE = 640  # letters; a request with its stages and its quality has 500


def tidy_json(value: JsonValue, margin: str = "") -> str:
    """`value` with containers broken into lines only where they are longer than LINE."""
    flat = json.dumps(value, ensure_ascii=False)
    inner = margin + " "
    if len(flat) <= LINE or not isinstance(value, dict | list):
        return flat
    if isinstance(value, dict):
        parts = [
            f"{json.dumps(key, ensure_ascii=False)}: {tidy_json(one, inner)}"
            for key, one in value.items()
        ]
    else:
        parts = [tidy_json(one, inner) for one in value]
    opening, closing = ("{", "}") if isinstance(value, dict) else ("[", "]")
    body = ",\n".join(inner + part for part in parts)
    return f"{opening}\n{body}\n{margin}{closing}"
