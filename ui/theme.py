"""The look: colours and shapes as Gradio theme variables. What a theme cannot say is in assets/style.css.

System fonts only, so that a page asks no other host for anything.
"""

from __future__ import annotations

from gradio.themes import Base, Color, Size

STONE = Color(
    "#faf9f7", "#f3f1ed", "#e7e4de", "#d6d2ca", "#a8a29a", "#78726a",
    "#57524b", "#3d3934", "#272421", "#1b1917", "#131110", name="stone",
)  # fmt: skip
PINE = Color(
    "#eef7f4", "#d7ece5", "#b0d9cc", "#80c0ad", "#4fa38c", "#2f8670",
    "#1f6b59", "#1a5648", "#17453b", "#133830", "#0a201b", name="pine",
)  # fmt: skip
RADIUS = Size("4px", "6px", "8px", "10px", "14px", "18px", "24px", name="radius_soft")
SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Noto Sans", "sans-serif")
MONO = ("ui-monospace", "SF Mono", "Cascadia Code", "Noto Sans Mono", "monospace")


def studio_theme() -> Base:
    theme = Base(
        primary_hue=PINE,
        secondary_hue=PINE,
        neutral_hue=STONE,
        radius_size=RADIUS,
        font=SANS,
        font_mono=MONO,
    )
    return theme.set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        background_fill_primary="white",
        background_fill_primary_dark="*neutral_900",
        background_fill_secondary="*neutral_100",
        background_fill_secondary_dark="*neutral_800",
        body_text_color="*neutral_900",
        body_text_color_dark="*neutral_100",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        border_color_primary="*neutral_200",
        border_color_primary_dark="*neutral_800",
        color_accent_soft="*primary_50",
        color_accent_soft_dark="*primary_900",
        link_text_color="*primary_600",
        link_text_color_dark="*primary_300",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_shadow="none",
        block_title_text_weight="500",
        block_info_text_size="*text_xs",
        input_background_fill="white",
        input_background_fill_dark="*neutral_900",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_700",
        input_border_width="1px",
        input_shadow_focus="0 0 0 3px *primary_100",
        input_shadow_focus_dark="0 0 0 3px *primary_800",
        slider_color="*primary_500",
        button_secondary_background_fill="transparent",
        button_secondary_background_fill_dark="transparent",
        button_secondary_background_fill_hover="*neutral_200",
        button_secondary_background_fill_hover_dark="*neutral_800",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_700",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_dark="*primary_500",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_hover_dark="*primary_400",
        button_primary_text_color="white",
    )
