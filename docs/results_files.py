"""A hook of MkDocs: the raw results stand outside of docs/, and links to them work on GitHub and on the site."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\((?:\.\./)+benchmarks/results/")


def on_files(files, config):
    """Add the results files to the site."""
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        files.append(File.generated(config, f"results_files/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, **_):
    """Point links from the repository's folder to the site's."""
    up = "../" * page.file.src_uri.count("/")
    return LINK.sub(f"]({up}results_files/", markdown)
