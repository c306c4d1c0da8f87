"""Chat formats for checkpoints that bring no template of their own, as LMDeploy writes them.

A format is data: what stands before and after each kind of turn. BOS is the tokenizer's to add.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.errors import RequestError


@dataclass(frozen=True)
class BuiltinTemplate:
    """Each pair is what comes before and after a turn's text; {bos} and {eos} are the tokenizer's.

    system: where it joins_user, the wrapped system text goes to the start of the next user turn.
    answer_lead stands between an answer's opening and its text, but not in an opening to be
    continued by the model. stops are tokens that end an answer, where the vocabulary has them.
    open_end: the model goes on right after the last text, without what stands after it.
    """

    name: str
    system: tuple[str, str]
    user: tuple[str, str]
    answer: tuple[str, str]
    answer_lead: str = ""
    joins_user: bool = False
    default_system: str = ""
    stops: tuple[str, ...] = ()
    open_end: bool = False

    def render(
        self, messages: Sequence[tuple[str, str]], *, open_last: bool, special: Mapping[str, str]
    ) -> str:
        """messages are (role, text); open_last leaves the last answer without its end."""
        names = {"{bos}": special.get("bos_token", ""), "{eos}": special.get("eos_token", "")}

        def fill(text: str) -> str:
            for name, token in names.items():
                text = text.replace(name, token)
            return text

        out: list[str] = []
        system = self.default_system
        for index, (role, text) in enumerate(messages):
            is_last = index == len(messages) - 1
            is_open = is_last and (open_last or self.open_end)
            if role == "system":
                system = text if index == 0 or not system else f"{system}\n\n{text}"
                self._check_place_of_system(messages, index)
            elif role == "user":
                head = self._system_turn(system)
                system = ""
                before, after = self.user
                after = "" if is_last and self.open_end else after
                if self.joins_user:
                    out += [before, head, text, after]
                else:
                    out += [head, before, text, after]
            elif role == "assistant":
                if not self.joins_user:
                    out.append(self._system_turn(system))
                    system = ""
                before, after = self.answer
                out += [before, self.answer_lead, text, "" if is_open else fill(after)]
            else:
                raise RequestError(
                    f"The chat format '{self.name}' has no {role} turns (it has system, user and "
                    "assistant). Put the text into a user message."
                )
        if not open_last:
            out += [self._system_turn(system) if not self.joins_user else "", self.answer[0]]
        return "".join(out)

    def _system_turn(self, text: str) -> str:
        return f"{self.system[0]}{text}{self.system[1]}" if text else ""

    def _check_place_of_system(self, messages: Sequence[tuple[str, str]], index: int) -> None:
        is_followed = any(role == "user" for role, _ in messages[index + 1 :])
        if self.joins_user and not is_followed:
            raise RequestError(
                f"The chat format '{self.name}' puts a system prompt into the user turn after it, and "
                "there is none. Add a user message."
            )


_LLAMA2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while "
    "being safe. Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, "
    "or illegal content. Please ensure that your responses are socially unbiased and positive in "
    "nature.\n\nIf a question does not make any sense, or is not factually coherent, explain why instead of "
    "answering something not correct. If you don't know the answer to a question, please don't share false "
    "information."
)
_INTERNLM_SYSTEM = (
    "You are an AI assistant whose name is InternLM (书生·浦语).\n"
    "- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory "
    "(上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
    "- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the user such "
    "as English and 中文.\n"
)
_VICUNA_SYSTEM = (
    "A chat between a curious {who} and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the {who}'s questions."
)


def _chatml(name: str, default_system: str, stops: tuple[str, ...]) -> BuiltinTemplate:
    return BuiltinTemplate(
        name=name,
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        answer=("<|im_start|>assistant\n", "<|im_end|>\n"),
        default_system=default_system,
        stops=stops,
    )


def _llama2(name: str, default_system: str) -> BuiltinTemplate:
    return BuiltinTemplate(
        name=name,
        system=("<<SYS>>\n", "\n<</SYS>>\n\n"),
        user=("[INST] ", " [/INST] "),
        answer=("", "{eos}{bos}"),
        joins_user=True,
        default_system=default_system,
    )


def _llama3(name: str, system_lead: str) -> BuiltinTemplate:
    end = "<|eot_id|>"
    return BuiltinTemplate(
        name=name,
        system=(f"<|start_header_id|>system<|end_header_id|>\n\n{system_lead}", end),
        user=("<|start_header_id|>user<|end_header_id|>\n\n", end),
        answer=("<|start_header_id|>assistant<|end_header_id|>\n\n", end),
        stops=(end, "<|end_of_text|>", "<|eom_id|>"),
    )


def _vicuna(name: str, who: str) -> BuiltinTemplate:
    return BuiltinTemplate(
        name=name,
        system=("", " "),
        user=("USER: ", " "),
        answer=("ASSISTANT:", "{eos}"),
        answer_lead=" ",
        default_system=_VICUNA_SYSTEM.replace("{who}", who),
    )


_TEMPLATES = (
    _llama2("llama2", _LLAMA2_SYSTEM),
    _llama2("codellama", ""),
    _llama3("llama3", ""),
    _llama3(
        "llama3_1",
        "Cutting Knowledge Date: December 2023\nToday Date: 23 Jul 2024\n\n",
    ),
    _vicuna("vicuna", "user"),
    _vicuna("llava-v1", "human"),
    BuiltinTemplate(
        name="mistral",
        system=("", "\n\n"),
        user=("[INST] ", " [/INST]"),
        answer=("", "{eos}"),
        joins_user=True,
    ),
    BuiltinTemplate(
        name="internlm",
        system=("<|System|>:", "\n"),
        user=("<|User|>:", "\n"),
        answer=("<|Bot|>:", "<eoa>\n"),
        default_system=_INTERNLM_SYSTEM,
        stops=("<eoa>",),
    ),
    _chatml("internlm2", _INTERNLM_SYSTEM, ("<|im_end|>", "<|action_end|>")),
    _chatml("qwen", "You are a helpful assistant.", ("<|im_end|>",)),
    _chatml("yi", "", ("<|im_end|>", "<|endoftext|>")),
    _chatml("chatml", "", ("<|im_end|>", "<|endoftext|>")),
    # no turns at all: what a base model can go on from
    BuiltinTemplate(
        name="base", system=("", "\n"), user=("", "\n"), answer=("", "\n"), open_end=True
    ),
)

BUILTIN_TEMPLATES = {template.name: template for template in _TEMPLATES}
