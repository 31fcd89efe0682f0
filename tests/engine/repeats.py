"""Drafts by lookup, as a loop over the text."""

from lepton.engine.lookup import MATCH, REMEMBERED


def found_by_loop(text, drafts, never):
    """Return what followed the newest tokens where they stood before, the latest place first; [] if they did not."""
    text = text[-REMEMBERED:]
    newest = text[-MATCH:]
    for start in range(len(text) - MATCH - 1, -1, -1):
        if text[start : start + MATCH] == newest:
            written = list(text)
            for _ in range(drafts):
                written.append(written[len(written) - len(text) + start + MATCH])
            found = written[len(text) :]
            return [] if never in found else found
    return []
