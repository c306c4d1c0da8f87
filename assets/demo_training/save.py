"""Write the demo model's folder: weights in bf16 and everything AutoProcessor needs beside them."""

import copy
import json
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

from assets.demo_training import conversations
from assets.demo_training import model as demo

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ['image', 'image_url'] -%}
{{- '<image>\\n' -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def save_folder(
    model: LlavaForConditionalGeneration, folder: Path, max_shard_size: str = "64MB"
) -> None:
    """Weights, config and the small files; tokenizer.json is made by tokenizer.py."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = model.config
    stored = copy.deepcopy(model).to(torch.bfloat16)
    stored.generation_config.update(
        bos_token_id=None,
        eos_token_id=ids.text_config.eos_token_id,
        pad_token_id=ids.text_config.pad_token_id,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        max_new_tokens=300,
    )
    stored.save_pretrained(folder, max_shard_size=max_shard_size)
    save_processor(folder)


def save_processor(folder: Path) -> None:
    """Tokenizer settings, image processor and chat template."""
    end, start, stop, image = conversations.SPECIALS
    size = {"height": demo.IMAGE_SIZE, "width": demo.IMAGE_SIZE}
    image_processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": 3,
        "do_center_crop": False,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(demo.NORM_MEAN),
        "image_std": list(demo.NORM_STD),
    }
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": end,
        "eos_token": stop,
        "additional_special_tokens": [start, image],
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "add_bos_token": False,
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": image,
        "patch_size": demo.PATCH,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    for name, content in (
        ("preprocessor_config.json", image_processor),
        ("tokenizer_config.json", tokenizer),
        ("processor_config.json", processor),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
