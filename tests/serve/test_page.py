"""The page at `/`: what it is made of, and where a browser is there, what people can do with it."""

import json
import math
import os
import re
import shutil
import subprocess
import urllib.request
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest

from lepton.api import Lepton
from lepton.generate.abstention import pieces_of
from lepton.model.budget import Budget
from lepton.model.promise import Promise
from tests.cli.tiny import save_tiny
from tests.serve.test_server import Command

PAGE = resources.files("lepton.serve").joinpath("page.html").read_text(encoding="utf-8")
NEEDED = ("LEPTON_PLAYWRIGHT", "LEPTON_CHROMIUM")
HAS_BROWSER = bool(shutil.which("node")) and all(name in os.environ for name in NEEDED)


SHOWN = {0x2400 + code: code for code in range(32)} | {0x2423: " ", 0x21B5: "\n", 0x21E5: "\t"}
"""What the page shows of spaces and control characters, and what they are."""


class Elements(HTMLParser):
    """The elements of a page with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


ELEMENTS = Elements(PAGE).found


def test_the_page_is_served_under_a_policy(server):
    status, headers, body = server.request("GET", "/")
    assert (status, body.decode()) == (200, PAGE)
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert "connect-src 'self'" in headers["content-security-policy"]


def test_it_fetches_nothing_from_elsewhere():
    assert re.findall(r"https?://|//[a-z]+\.", PAGE) == []
    assert not [tag for tag, given in ELEMENTS if tag in ("script", "img", "iframe") and "src" in given]
    assert [given["href"] for tag, given in ELEMENTS if tag == "link"] == ["data:,"]


def test_text_of_the_model_is_never_read_as_html():
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", PAGE)


def test_every_field_has_a_label_and_every_id_is_there():
    labels = {given.get("for") for tag, given in ELEMENTS if tag == "label"}
    fields = {given["id"] for tag, given in ELEMENTS if tag in ("input", "select", "textarea")}
    assert fields == labels
    ids = [given["id"] for _, given in ELEMENTS if "id" in given]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'\$\("([a-z-]+)"\)', PAGE))
    assert used <= set(ids)
    assert {"lang": "en"} in [given for tag, given in ELEMENTS if tag == "html"]


def test_the_model_tells_the_page_what_it_needs(server):
    (model,) = server.get("/v1/models")[1]["data"]
    used = set(re.findall(r"(?:model|about)\.([a-z_]+)", PAGE)) - {"id"}
    assert used <= model.keys()


def answered(port, messages, temperature, tokens):
    """What the server answers to a whole conversation."""
    body = {"messages": messages, "seed": 7, "temperature": temperature, "max_tokens": tokens}
    url, headers = f"http://127.0.0.1:{port}/v1/chat/completions", {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as reply:
        return json.load(reply)["choices"][0]["message"]["content"]


def shown(message):
    return f"You: {message['content']}\n" if message["role"] == "user" else f"{message['content']}\n\n"


def calibrated(tmp_path):
    """A checkpoint that may abstain from half of a text and from all of it, and skip blocks; and one that may not."""
    model, tokenizer = save_tiny(tmp_path / "plain.pt")
    _, unsure = model.generate_with_uncertainty(tokenizer.encode("fox"), 24, seed=5, temperature=1.0)
    chance = sorted(unsure)[11]
    slope, shift = model.uncertainty.calibration.tolist()
    threshold = (math.log(chance / (1 - chance)) - shift) / slope + 1e-4
    of = {"confidence": 0.9, "windows": 100, "tokens": 1000}
    promises = [Promise(risk=0.2, threshold=threshold, **of), Promise(risk=0.01, threshold=None, **of)]
    budget = Budget(max_cost=0.05, least=0.0, share=0.5, cost=0.04, error=0.01, tokens=1000)
    records = {"promises": [each.to_dict() for each in promises], "budgets": [budget.to_dict()]}
    save_tiny(tmp_path / "x.pt", **records)
    return Lepton.from_checkpoint(tmp_path / "x.pt"), tokenizer


@pytest.mark.skipif(not HAS_BROWSER, reason=f"needs node, and playwright-core and Chromium: set {' and '.join(NEEDED)}")
def test_what_people_can_do_with_it(tmp_path):
    model, tokenizer = calibrated(tmp_path)
    path, plain_path = tmp_path / "x.pt", tmp_path / "plain.pt"
    script = Path(__file__).with_name("page.mjs")
    seen = {"shade": [], "turn": [], "crystals": []}
    with Command(path) as command, Command(plain_path) as plain:
        urls = [f"http://127.0.0.1:{each.port}/" for each in (command, plain)]
        words = ["node", str(script), urls[0], os.environ.get("LEPTON_SCREENSHOTS", ""), urls[1]]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as browser:
            for line in browser.stdout:
                name, value = json.loads(line)
                if name == "kill":
                    command.process.kill()
                elif name in ("shade", "crystals"):
                    seen[name].append(value)
                elif name == "turn":
                    text, messages, *options = value
                    seen[name].append((text, messages, answered(command.port, messages[:-1], *options)))
                else:
                    seen[name] = value
    assert browser.returncode == 0
    wanted = model.generate(tokenizer.encode("fox"), 24, seed=5, temperature=float(seen["temperature"]))
    assert seen["written"] == tokenizer.decode(wanted)
    assert "seed 5; length" in seen["figures"]
    assert all("probability" in label and "unsure" in label for label in seen["labels"])
    assert (seen["focused"], seen["chosen"][: len(seen["labels"][1])]) == ("1", seen["labels"][1])
    assert 5 <= seen["alternatives"] <= 9  # eight and the chosen one, but ids without text count as one
    name, before, given = seen["alternative"]
    assert given == before + name.translate(SHOWN)
    shades = dict(seen["shade"])
    strengths = [float(colour.rpartition(",")[2].rstrip(")")) for colour in shades["uncertainty"]]
    assert strengths == pytest.approx([0.45 * unsure for unsure in seen["unsure"]], abs=0.004)
    assert set(shades["none"]) == {"rgba(0, 0, 0, 0)"}
    check_calibrated(seen, model, tokenizer)
    assert (seen["narrow"], seen["enlarged"]) == (375, 550)
    assert seen["dark"][0] != seen["dark"][1]
    assert "stopped" in seen["stopped"]
    assert seen["mistake"].startswith("max_tokens=1000000: must be a whole number")
    assert seen["died"][0] in ("The server does not answer.", "the answer broke off: the server has gone")
    assert seen["died"][1]
    assert seen["errors"] == []
    for text, messages, wanted in seen["turn"]:
        assert messages[-1] == {"role": "assistant", "content": wanted}
        assert text == "".join(map(shown, messages))
    assert [len(messages) for _, messages, _ in seen["turn"]] == [2, 4, 10]
    text, messages, unread = seen["after the stop"]
    assert (text, len(messages), unread) == ("".join(map(shown, messages)), 8, 0)
    assert seen["talk named"] == ["Your message", "Send", False]
    assert seen["talk begins"] == ["Talk with the model to see what it keeps.", True]
    assert seen["talk alternatives"] == 0
    first, second = seen["crystals"]
    assert len(first) == model.config.idea("crystals").slots
    assert second == first[:1] + first[2:]
    assert seen["focus"].startswith("Forget")
    assert seen["narrow talk"] == 375
    assert seen["reloaded"] == [True, second, "talk"]
    assert seen["fresh"] == ["", [], 404]
    assert seen["no file"] == "This file holds no conversation that a page like this has saved."
    assert seen["loaded"] == [True, second, ""]
    assert seen["stopped turn"][0] == [2, 6]
    assert "stopped" in seen["stopped turn"][1]
    assert seen["kept"] == 0
    assert seen["text again"] == ["", "Write on"]


def check_calibrated(seen, model, tokenizer):
    """The sliders of abstention and cost, and what they do."""
    run = "Not calibrated for this checkpoint: run python -m lepton calibrate with"
    assert seen["not calibrated"] == [
        [False, True, False, True],
        f"{run} --risk on it.",
        f"{run} --max_cost on it.",
        "off",
    ]
    assert seen["calibrated"] == [[False] * 4, "", ""]
    assert seen["off again"] == [False] * 4
    fixed = "Depth and thinking are set {}, as they were calibrated."
    while_ = [
        [True, True, True, False],
        "at most 20 %",
        fixed.format("while the model abstains"),
        "Off while the model abstains.",
    ]
    assert seen["risk"] == while_
    assert seen["cost"] == [[True, False, True, False], "0.05 nats a token", fixed.format("by the cost")]
    ids, options = tokenizer.encode("fox"), {"seed": 5, "temperature": float(seen["temperature"])}
    tokens, abstained, _ = model.generate(ids, 24, abstain_at=0.2, **options)
    text, marks, written, asked = seen["abstained"]
    assert asked == [0.2, None, None, None]
    assert written == tokenizer.decode(tokens)
    wanted = [doubtful for _, doubtful in pieces_of(tokenizer.stream_decoder(), tokens[len(ids) :], abstained)]
    assert [mark for mark, _, _ in marks] == wanted
    assert 0 < sum(wanted) < len(wanted)
    assert all(named == mark and (after == '"?"') == mark for mark, named, after in marks)
    assert text.startswith(f"The model abstains from {sum(wanted)} of {len(wanted)} pieces of text, marked with")
    assert "Elsewhere at most 20 % of its best guesses are wrong" in text
    whole = "The model abstains from this whole answer: it vouches for none of it."
    assert seen["abstained from all"] == [whole, True, [0.01, None, None, None]]
    costly = tokenizer.decode(model.generate(ids, 24, max_cost=0.05, **options))
    assert seen["at a cost"] == [costly, "", False, [None, 0.05, None, None]]
