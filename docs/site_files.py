"""A hook of MkDocs: files outside of docs/ that the pages link to. The links work on GitHub and on the site."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
FILES = {"benchmarks/results": "*.json", "examples": "*.py"}
"""Folders of the repository and what the site takes from them, under the same path."""
LINK = re.compile(rf"\]\((?:\.\./)+({'|'.join(FILES)})/")


def on_files(files, config):
    """Add the files to the site."""
    for folder, pattern in FILES.items():
        for path in sorted((ROOT / folder).glob(pattern)):
            files.append(File.generated(config, f"{folder}/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, **_):
    """Make links that leave docs/ relative to the site's root."""
    up = "../" * page.file.src_uri.count("/")
    return LINK.sub(rf"]({up}\1/", markdown)
