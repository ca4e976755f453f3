"""`psa encode`: whole user tables to files, in one process and in several, with either encoder."""

from __future__ import annotations

import csv
import os
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from pairs import write_sage_split
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from comfyui_psa.profiles import Profile, simulate_users, user_row
from comfyui_psa.profiles.encoders import AttributesEncoder, LanguageModelEncoder, find_language_model
from comfyui_psa.training.data.users import load_user_embedding
from comfyui_psa.training.data_commands import check_data, encode

USERS = simulate_users(5, seed=6)
LAUNCHED = "import typer\nfrom comfyui_psa.training.data_commands import encode\ntyper.run(encode)\n"


def _write_table(path: Path, users: list[Profile]) -> Path:
    rows = [user_row(number, user) for number, user in enumerate(users, start=1)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return _write_table(tmp_path / "users.csv", USERS)


def _run(*arguments: str | Path) -> Result:
    app = typer.Typer()
    app.command("check-data")(check_data)
    app.command("encode")(encode)
    return CliRunner().invoke(app, ["encode", *map(str, arguments)])


def _embeddings(folder: Path) -> dict[str, list[float]]:
    return {path.stem: np.load(path).tolist() for path in sorted(folder.glob("*.npy"))}


def _expected(users: list[Profile]) -> dict[str, list[float]]:
    vectors = AttributesEncoder().encode(users).tolist()
    return {f"{number:07d}": vector for number, vector in enumerate(vectors, start=1)}


def test_a_user_table_becomes_a_folder_of_embeddings(table: Path, tmp_path: Path) -> None:
    result = _run(table, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "5/5" in result.output
    assert _embeddings(tmp_path / "out") == _expected(USERS)


def test_the_folder_is_one_that_a_set_of_pairs_can_be_checked_with(tmp_path: Path) -> None:
    sage = write_sage_split(tmp_path / "sage", rows=5, users=3)
    assert _run(sage, tmp_path / "out").exit_code == 0
    assert _embeddings(tmp_path / "out") == _expected([simulate_users(number, 0)[-1] for number in (1, 2, 3)])
    app = typer.Typer()
    app.command("check-data")(check_data)
    assert CliRunner().invoke(app, [str(sage), "--embeddings", str(tmp_path / "out")]).exit_code == 0


def test_a_second_run_touches_nothing_but_what_is_missing(table: Path, tmp_path: Path) -> None:
    _run(table, tmp_path / "out")
    (tmp_path / "out" / "0000003.npy").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert _run(table, tmp_path / "out", "--batch-size", "2").exit_code == 0
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert after.items() >= before.items()
    assert set(after) - set(before) == {"0000003.npy"}
    assert _embeddings(tmp_path / "out") == _expected(USERS)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with the language model "tiny": one random layer that reads letters."""
    letters = {letter: number for number, letter in enumerate(" ?" + string.ascii_letters + string.digits + ".")}
    tokens = Tokenizer(WordLevel(letters, unk_token="?"))
    tokens.pre_tokenizer = Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token=" ", unk_token="?")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "models" / "tiny")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(letters), **sizes)).save_pretrained(
        tmp_path / "models" / "tiny"
    )
    return tmp_path / "models"


def test_a_language_model_encodes_with_the_template_given(table: Path, tmp_path: Path, models: Path) -> None:
    template = tmp_path / "template.txt"
    template.write_text("Somebody of <<AGE>> years.", encoding="utf-8")
    model = ("--kind", "llm", "--name", "someone/tiny", "--language-models", models)
    result = _run(table, tmp_path / "out", *model, "--template", template, "--batch-size", "2")
    assert result.exit_code == 0, result.output
    encoder = LanguageModelEncoder("someone/tiny", template.read_text(), find_language_model("tiny", [models]))
    expected = encoder.encode(USERS)
    assert len({user.age for user in USERS}) == len(set(map(tuple, expected.tolist()))) > 1
    for number, row in enumerate(expected, start=1):
        found = load_user_embedding(tmp_path / "out", f"{number:07d}")
        torch.testing.assert_close(found, row, atol=1e-5, rtol=0)
    mixed = _run(table, tmp_path / "out", *model)
    assert "another encoder" in str(mixed.exception)


def test_what_the_command_cannot_use_is_said(table: Path, tmp_path: Path) -> None:
    for arguments, message in [
        (("--kind", "zork"), "--kind: Input should be 'llm' or 'attributes'"),
        (("--kind", "llm"), "needs the name of its language model"),
        (("--kind", "llm", "--name", "a/b", "--language-models", tmp_path), "a/b, which is not on this machine"),
        (("--name", "attributes-9"), 'no attributes encoder "attributes-9"'),
    ]:
        assert message in str(_run(table, tmp_path / "out", *arguments).exception)
    assert "There is no folder" in str(_run(tmp_path / "nowhere", tmp_path / "out").exception)
    assert not (tmp_path / "out").exists()


def test_two_processes_share_the_users(table: Path, tmp_path: Path) -> None:
    script = tmp_path / "encode.py"
    script.write_text(LAUNCHED, encoding="utf-8")
    # What `accelerate launch` runs, and unlike it also where there is no GPU.
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    command = (*launch, script, table, tmp_path / "out", "--batch-size", "2")
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert _embeddings(tmp_path / "out") == _expected(USERS)
    # The first process has users 1, 3 and 5, and is the one that shows its progress.
    assert "3/3" in done.stderr
    assert "2/2" not in done.stderr
