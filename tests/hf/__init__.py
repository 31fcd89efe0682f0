"""Tests of `lepton.hf`. Importing this skips all of them where its extra is missing."""

import pytest

pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
