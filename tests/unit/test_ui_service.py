"""Conversations and answers: what the chat page relies on, with a fake engine behind the real service."""

import threading
import time

import pytest
from PIL import Image

from engine.config import EngineConfig
from engine.errors import ConfigError, RequestError
from engine.types import ImagePart
from tests.unit.fake_engine import FakeEngine, FakeHost
from ui import service as service_module
from ui.conversation import ConversationStore, Phase
from ui.service import StudioService

SETTINGS = {
    "system_prompt": "",
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 0,
    "repetition_penalty": 1,
    "max_new_tokens": 64,
    "seed": "",
}


def wait_for(is_so):
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.005)


@pytest.fixture
def start():
    services = []

    def start(load=True, grace_s=30.0, **options):
        engine = FakeEngine(**{"words": 5, "word_s": 0.0, "requests": []} | options)
        service = StudioService(FakeHost(engine), unattended_grace_s=grace_s)
        services.append(service)
        if load:
            service.load(EngineConfig("models/fake-model"))
        return service, engine

    yield start
    for service in services:
        service.close()


def say(service, words="Hello", files=(), conversation=None, **settings):
    conversation = conversation or service.open(None)
    return service.send(conversation.id, words, list(files), SETTINGS | settings)


def last(conversation):
    return conversation.turns[-1].answer


def finished(conversation):
    wait_for(lambda: last(conversation).phase.is_final)
    return last(conversation)


def picture_file(folder):
    path = folder / "picture.png"
    Image.new("RGB", (8, 8), "red").save(path)
    return str(path)


def test_an_answer_carries_the_engines_text_and_figures(start):
    service, _ = start()
    answer = finished(say(service))
    assert answer.phase is Phase.DONE
    assert answer.text == "The quick brown fox jumps "
    assert (answer.prompt_tokens, answer.completion_tokens) == (24, 5)
    assert answer.finish_reason == "stop"


def test_the_model_hears_system_prompt_past_turns_and_settings(start):
    service, engine = start()
    conversation = say(service, "One")
    finished(conversation)
    finished(say(service, "Two", conversation=conversation, system_prompt="Be brief.", seed=" 7 "))
    request = engine.requests[-1]
    assert [message.role for message in request.prompt] == ["system", "user", "assistant", "user"]
    assert request.prompt[0].content == "Be brief."
    assert request.prompt[-1].content == "Two"
    assert (request.params.seed, request.params.top_p) == (7, 0.9)


def test_pictures_come_before_the_words(start, tmp_path):
    service, engine = start()
    finished(say(service, "What is it?", [picture_file(tmp_path)]))
    kinds = [type(part) for part in engine.requests[-1].prompt[-1].content]
    assert kinds[0] is ImagePart
    assert len(kinds) == 2


def test_stop_aborts_in_the_engine_and_keeps_what_is_there(start):
    gate = threading.Event()
    service, engine = start(gate=gate)
    conversation = say(service)
    wait_for(lambda: engine.running == 1)
    service.stop(conversation.id)
    assert last(conversation).phase is Phase.STOPPED
    wait_for(lambda: engine.running == 0)


def test_a_message_sent_while_the_model_loads_is_answered_afterwards(start):
    service, engine = start(load=False)
    conversation = say(service)
    assert service.status()["phase"] == "empty"
    service.load(EngineConfig("models/fake-model"))
    assert finished(conversation).phase is Phase.DONE
    assert len(engine.requests) == 1


@pytest.mark.parametrize(("words", "sentence"), [("fail", "9,120 tokens"), ("crash", "foresee")])
def test_a_failure_is_a_sentence_and_loses_no_text(start, words, sentence):
    service, _ = start()
    conversation = say(service, words)
    assert sentence in finished(conversation).error
    assert conversation.turns[-1].text == words


def test_a_failed_turn_is_not_told_to_the_model(start):
    service, engine = start()
    conversation = say(service, "fail")
    finished(conversation)
    finished(say(service, "Hello", conversation=conversation))
    assert [message.content for message in engine.requests[-1].prompt] == ["Hello"]


def test_a_text_model_refuses_pictures_before_anything_is_stored(start, tmp_path):
    service, _ = start(supports_images=False)
    conversation = service.open(None)
    with pytest.raises(RequestError, match="reads text only"):
        say(service, "What is it?", [picture_file(tmp_path)], conversation)
    assert conversation.turns == []


@pytest.mark.parametrize(
    ("words", "settings", "error"),
    [
        ("  ", {}, RequestError),
        ("Hello", {"seed": "seven"}, RequestError),
        ("Hello", {"temperature": -1}, ConfigError),
    ],
)
def test_what_cannot_be_sent_leaves_the_conversation_as_it_was(start, words, settings, error):
    service, _ = start()
    conversation = service.open(None)
    with pytest.raises(error):
        say(service, words, conversation=conversation, **settings)
    assert conversation.turns == []


def test_a_broken_picture_is_refused(start, tmp_path):
    service, _ = start()
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(RequestError):
        say(service, "What is it?", [str(broken)])


def test_one_answer_at_a_time(start):
    service, _ = start(gate=threading.Event())
    conversation = say(service)
    with pytest.raises(RequestError, match="still being written"):
        say(service, "Again", conversation=conversation)


def test_regenerate_and_edit_drop_what_followed(start):
    service, engine = start()
    conversation = say(service, "One")
    finished(conversation)
    finished(say(service, "Two", conversation=conversation))
    service.regenerate(conversation.id, 0, SETTINGS)
    finished(conversation)
    assert [turn.text for turn in conversation.turns] == ["One"]
    service.edit(conversation.id, 0, "Better", SETTINGS)
    finished(conversation)
    assert [message.content for message in engine.requests[-1].prompt] == ["Better"]


def test_undo_returns_the_last_turn(start):
    service, _ = start()
    conversation = say(service, "One")
    finished(conversation)
    assert service.undo(conversation.id)[1].text == "One"
    assert service.undo(conversation.id)[1] is None


def test_an_answer_that_nobody_watches_is_given_up(start):
    service, engine = start(grace_s=0.05, gate=threading.Event())
    conversation = say(service)
    wait_for(lambda: last(conversation).phase is Phase.STOPPED)
    wait_for(lambda: engine.running == 0)


def test_an_unknown_id_gets_a_new_conversation_and_never_anothers(start):
    service, _ = start()
    mine = service.open(None)
    assert service.open(mine.id) is mine
    assert service.open("guess").id not in ("guess", mine.id)
    with pytest.raises(RequestError, match="no longer has this conversation"):
        service.stop("guess")


def test_a_load_that_fails_says_why_and_answers_the_waiting(start):
    class BrokenHost(FakeHost):
        def load(self, config, on_progress=None):
            raise ConfigError("The checkpoint is broken.")

    service = StudioService(BrokenHost(FakeEngine()))
    conversation = say(service)
    with pytest.raises(ConfigError):
        service.load(EngineConfig("models/fake-model"))
    assert service.status()["words"] == "The checkpoint is broken."
    assert finished(conversation).phase is Phase.FAILED
    service.close()


def test_the_store_forgets_the_least_recently_used():
    dropped = []
    store = ConversationStore(dropped.append, max_conversations=2)
    first, second = store.create(), store.create()
    store.find(first.id)
    third = store.create()
    assert dropped == [second]
    assert store.all() == [first, third]


def test_the_store_forgets_the_idle():
    dropped = []
    store = ConversationStore(dropped.append, idle_expiry_s=60)
    idle, used = store.create(), store.create()
    idle.seen_at -= 61
    store.drop_idle()
    assert dropped == [idle]
    assert store.all() == [used]


def test_a_picture_in_use_is_kept_young(start, tmp_path, monkeypatch):
    touched = []
    monkeypatch.setattr(service_module.os, "utime", touched.append)
    service, _ = start()
    path = picture_file(tmp_path)
    finished(say(service, "What is it?", [path]))
    assert touched == [path]
