"""`verify` and `doctor`, as words and as data."""

from __future__ import annotations

import json
from pathlib import Path

from sparsmith.cli import main


def test_doctor_tells_what_is_there_and_what_is_missing(monkeypatch, capsys):
    from sparsmith.app import checkup

    wanted = ["torch>=2.10", "safetensors>=999", 'no-such-package>=1; extra == "serve"', 'pytest>=9; extra == "dev"']
    monkeypatch.setattr(checkup, "requires", lambda name: wanted)
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    states = {row["name"]: row["fault"] for row in found["packages"]}
    assert states["torch"] == "" and "999" in states["safetensors"] and states["no-such-package"] == "not installed"
    assert "pytest" not in states
    assert len(found["missing"]) == 2 and "pip install 'sparsmith[serve]'" in found["missing"][1]
    assert found["free"]["memory"] > 0 and found["free"]["disk"] > 0
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert (
        "free disk: " in text and "missing: no-such-package" in text and f"torch: {found['versions']['torch']}" in text
    )


def test_verify_says_it_in_words_and_as_data(tmp_path, capsys):
    golden = Path(__file__).resolve().parents[2] / "golden" / "v1"
    assert main(["verify", str(golden / "delta")]) == 0
    assert capsys.readouterr().out.startswith(f"whole: {golden / 'delta'} (delta, 4 files")
    assert main(["verify", str(golden / "export"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["folders"][0]["kind"] == "full"
    assert main(["verify", str(tmp_path)]) == 7
