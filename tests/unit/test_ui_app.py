"""The command line: where a model comes from, what a mistake costs, what reaches the network."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import app
from engine.errors import ConfigError

ROOT = Path(app.__file__).parent


def test_flags_may_be_written_with_underscores():
    arguments = app.build_parser().parse_args(
        ["--server_port", "0", "--cache_max_entry_count=0.5", "--model", "some_folder"]
    )
    assert arguments.server_port == 0
    assert arguments.cache_max_entry_count == 0.5
    assert arguments.model == "some_folder"


def test_only_given_settings_reach_the_engine(tmp_path):
    arguments = app.build_parser().parse_args(["--session-len", "512", "--device", "cpu"])
    config = app.engine_config(arguments, app.ModelSource(tmp_path))
    assert (config.session_len, config.device, config.max_batch_size) == (512, "cpu", 64)


def test_a_folder_wins_over_a_hub_name(tmp_path, monkeypatch):
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert app.find_model("owner/model") == app.ModelSource(Path("owner/model"))
    assert app.find_model("owner/other").hub_id == "owner/other"
    assert app.find_model(None).folder == app.DEMO_MODEL
    with pytest.raises(ConfigError, match="no model folder at /nowhere/at/all"):
        app.find_model("/nowhere/at/all")


def test_nothing_is_shared_unless_asked():
    assert app.build_parser().parse_args([]).share is False
    assert app.build_parser().parse_args([]).server_name == "127.0.0.1"


@pytest.mark.parametrize("online", [False, True])
def test_the_network_is_off_unless_a_hub_name_is_given(monkeypatch, online):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    app.set_environment(online=online)
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert ("HF_HUB_OFFLINE" in os.environ) is not online


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "./nowhere"], "no model folder"),
        (["--server-port", "70000"], "is not a port"),
        (["--session-len", "0"], "session_len is 0"),
        (["--modell", "x"], "--help"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, sentence):
    done = subprocess.run(
        [sys.executable, "app.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_taken_port_is_named_with_a_way_out():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf":{port}.*--server-port {port + 1}"):
            app.bind("127.0.0.1", port)
