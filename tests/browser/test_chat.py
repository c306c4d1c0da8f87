"""The chat page as a person uses it, in a real browser, on the real program with the demo model."""

import io

import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import expect

LONG_WORD = "x" * 80


def picture():
    image = Image.new("RGB", (224, 224), "white")
    ImageDraw.Draw(image).ellipse((50, 50, 170, 170), fill="red")
    data = io.BytesIO()
    image.save(data, "PNG")
    return {"name": "circle.png", "mimeType": "image/png", "buffer": data.getvalue()}


def ask(page, words, *files):
    if files:
        page.set_input_files("#composer input[type=file]", list(files))
        expect(page.locator("#composer .thumbnail-item")).to_have_count(len(files))
    page.fill("#composer textarea", words)
    page.press("#composer textarea", "Enter")


def limit_answers(page, tokens):
    field = page.locator("#max-new-tokens input[type=number]")
    field.fill(str(tokens))
    field.press("Tab")


def ask_for_a_long_answer(page):
    """On an endless page: 1,900 tokens, unless somebody stops it."""
    limit_answers(page, 1900)
    ask(page, LONG_WORD)
    expect(answers(page)).not_to_be_empty()


def said(page):
    return page.locator("#chat-log .user-row .message")


def answers(page):
    return page.locator("#chat-log .bot-row:not(:has(.lm-aside))")


def statistics(page):
    return page.locator("#chat-log .lm-stats")


def test_an_answer_streams_in_and_its_statistics_follow(page):
    ask(page, "Hello, who are you?")
    expect(said(page)).to_have_text("Hello, who are you?")
    expect(page.locator("#composer textarea")).to_have_value("")
    expect(answers(page)).not_to_be_empty()
    line = statistics(page)
    for words in ("first token after", "tokens in", "out"):
        expect(line).to_contain_text(words)
    expect(page.locator("#composer .submit-button")).to_be_visible()


def test_a_picture_is_sent_with_its_question(page):
    ask(page, "What is in this picture?", picture())
    expect(said(page).locator("img")).to_be_visible()
    expect(statistics(page)).to_contain_text("from pictures")
    expect(answers(page)).not_to_be_empty()


def test_stop_ends_the_work_in_the_engine_and_keeps_the_text(endless_page, endless_studio):
    page = endless_page
    ask_for_a_long_answer(page)
    page.click("#composer .stop-button")
    expect(statistics(page)).to_contain_text("stopped by you")
    expect(answers(page)).not_to_be_empty()
    endless_studio.wait_until(
        lambda status: status["running"] == 0, "the engine goes on after Stop"
    )


def test_escape_stops_and_the_chat_goes_on(endless_page):
    page = endless_page
    ask_for_a_long_answer(page)
    page.keyboard.press("Escape")
    expect(statistics(page)).to_contain_text("stopped by you")
    limit_answers(page, 20)
    ask(page, "Hello!")
    expect(answers(page)).to_have_count(2)
    expect(statistics(page)).to_have_count(2)


def test_what_is_written_during_an_answer_stays_in_the_composer(endless_page):
    page = endless_page
    ask_for_a_long_answer(page)
    page.fill("#composer textarea", "My next question")
    page.press("#composer textarea", "Enter")
    expect(page.locator("#chat-log .lm-notice")).to_contain_text("still being written")
    page.click("#composer .stop-button")
    expect(page.locator("#composer .submit-button")).to_be_visible()
    expect(page.locator("#composer textarea")).to_have_value("My next question")


def test_regenerate_writes_the_last_answer_anew(page):
    ask(page, "Hello!")
    expect(statistics(page)).to_have_count(1)
    page.locator("#seed textarea, #seed input").fill("not a number")
    page.locator("#chat-log [aria-label=Retry]").click()
    expect(page.locator("#chat-log .lm-notice")).to_contain_text("expected a whole number")
    page.locator("#seed textarea, #seed input").fill("7")
    ask(page, "Once more")
    expect(statistics(page)).to_have_count(2)
    page.locator("#chat-log [aria-label=Retry]").click()
    expect(page.locator("#chat-log .lm-notice")).to_have_count(0)
    expect(statistics(page)).to_have_count(2)
    expect(said(page)).to_have_count(2)


def test_editing_a_message_drops_what_followed_and_answers_again(page):
    ask(page, "First question <b>")
    expect(statistics(page)).to_have_count(1)
    ask(page, "Second question")
    expect(statistics(page)).to_have_count(2)
    said(page).first.hover()
    page.locator("#chat-log [aria-label=Edit]").first.click()
    page.locator("#chat-log textarea").fill("Better question <i>")
    page.locator("#chat-log [aria-label=Submit]").click()
    expect(said(page)).to_have_text(["Better question <\u2060i>"])
    expect(statistics(page)).to_have_count(1)


def test_undo_gives_the_message_back_to_its_writer(page):
    ask(page, "A message to take back")
    expect(statistics(page)).to_have_count(1)
    page.locator("#chat-log [aria-label=Undo]").click()
    expect(page.locator("#composer textarea")).to_have_value("A message to take back")
    expect(said(page)).to_have_count(0)


def test_new_chat_shows_the_empty_page_again(page):
    ask(page, "Hello!")
    expect(statistics(page)).to_have_count(1)
    page.click("#new-chat")
    expect(said(page)).to_have_count(0)
    expect(page.locator("#chat-log .placeholder h2")).to_be_visible()


def test_an_example_is_asked_with_one_click(page):
    page.locator("#chat-log .example").last.click()
    expect(said(page).last).not_to_be_empty()
    expect(statistics(page)).to_have_count(1)


def test_reloading_in_mid_answer_finds_the_answer_again(endless_page):
    page = endless_page
    ask_for_a_long_answer(page)
    page.reload()
    expect(said(page)).to_have_text(LONG_WORD)
    page.click("#composer .stop-button")
    expect(statistics(page)).to_contain_text("stopped by you")


def test_two_people_do_not_see_each_other(open_page):
    ann, bob = open_page(), open_page()
    ask(ann, "This is Ann's secret.")
    expect(statistics(ann)).to_have_count(1)
    bob.reload()
    expect(bob.locator("#chat-log .placeholder h2")).to_be_visible()
    expect(bob.locator("body")).not_to_contain_text("secret")


def test_a_file_that_is_no_picture_is_refused_and_the_text_stays(page):
    broken = {"name": "broken.png", "mimeType": "image/png", "buffer": b"not a picture"}
    ask(page, "What is this?", broken)
    expect(page.locator("#chat-log .lm-notice")).to_be_visible()
    expect(page.locator("#composer textarea")).to_have_value("What is this?")


def test_markup_in_a_message_is_shown_and_fetches_nothing(page):
    ask(page, 'Say <img src="http://example.com/x.png"> and <script>alert(1)</script>')
    expect(said(page)).to_contain_text("script>alert(1)")
    expect(statistics(page)).to_have_count(1)


@pytest.mark.parametrize("width", [380, 768])
def test_a_narrow_screen_needs_no_sideways_scrolling(open_endless_page, width):
    page = open_endless_page(viewport={"width": width, "height": 740}, has_touch=True)
    page.fill("#composer textarea", LONG_WORD * 3)
    page.click("#composer .submit-button")
    expect(answers(page)).not_to_be_empty()
    page.click("#composer .stop-button")
    expect(statistics(page)).to_have_count(1)
    widths = (
        "[document.documentElement.scrollWidth, document.querySelector('#chat-log').scrollWidth]"
    )
    assert max(page.evaluate(widths)) <= width
    page.click("#toggle-settings")
    expect(page.locator("#temperature")).to_be_visible()
    assert max(page.evaluate(widths)) <= width


def test_settings_over_the_chat_close_by_button_and_give_the_focus_back(open_page):
    page = open_page(viewport={"width": 380, "height": 740})
    page.focus("#toggle-settings")
    page.keyboard.press("Enter")
    close = page.get_by_role("button", name="Close settings")
    expect(close).to_be_in_viewport()
    expect(close).to_be_focused()
    page.locator("#seed").scroll_into_view_if_needed()
    expect(close).to_be_in_viewport()
    page.keyboard.press("Enter")
    expect(page.locator("#settings")).to_be_hidden()
    expect(page.locator("#toggle-settings")).to_be_focused()
    page.click("#toggle-settings")
    close.click()
    expect(page.locator("#settings")).to_be_hidden()
    page.set_viewport_size({"width": 1280, "height": 800})
    expect(page.locator("#temperature")).to_be_visible()
    expect(close).to_be_hidden()


def test_enter_makes_a_new_line_on_a_touch_screen(open_page):
    page = open_page(viewport={"width": 380, "height": 740}, has_touch=True, is_mobile=True)
    page.locator("#composer textarea").press_sequentially("one")
    page.press("#composer textarea", "Enter")
    page.locator("#composer textarea").press_sequentially("two")
    expect(page.locator("#composer textarea")).to_have_value("one\ntwo")


@pytest.mark.parametrize(("theme", "is_dark"), [("light", False), ("dark", True)])
def test_the_theme_reaches_every_corner(open_page, theme, is_dark):
    page = open_page(f"?__theme={theme}")
    ask(page, "Hello!")
    expect(statistics(page)).to_have_count(1)
    shot = Image.open(io.BytesIO(page.screenshot())).convert("L")
    bright = sum(shot.histogram()[128:]) / (shot.width * shot.height)
    assert bright < 0.1 if is_dark else bright > 0.9


def test_a_screen_reader_finds_names(page):
    assert page.locator("h1").count() == 1
    expect(page.get_by_role("textbox", name="Your message")).to_be_visible()
    nameless = """[...document.querySelectorAll('button')].filter(b => b.checkVisibility()
        && !(b.innerText.trim() || b.ariaLabel || b.title)).map(b => b.outerHTML)"""
    assert page.evaluate(nameless) == []
