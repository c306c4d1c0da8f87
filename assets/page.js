// The page's own script: header, labels and keys. Texts come in LMDECK_TEXT; the server's words reach
// the page as textContent only, so that no name can become markup.
(() => {
  const POLL_MS = 2000, POLL_LOADING_MS = 700, POLL_HURRIED_MS = 200;
  const WIDE = matchMedia("(min-width: 1000px)");
  const touch = matchMedia("(pointer: coarse)");
  const say = (key, values = {}) => LMDECK_TEXT[key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
  const find = (selector) => document.querySelector(selector);
  const set = (element, name, value) => element && element.getAttribute(name) !== value && element.setAttribute(name, value);
  let model = null;

  // Light or dark: what the address says, else what was chosen here before, else the system.
  const asked = new URLSearchParams(location.search).get("__theme");
  const chosen = asked || localStorage.getItem("lmdeck-theme");
  const applyTheme = (theme) => document.body.classList.toggle("dark", theme === "dark");
  if (chosen) document.addEventListener("DOMContentLoaded", () => applyTheme(chosen));

  // The settings stand beside the chat on a wide screen and over it on a narrow one.
  const showSettings = (open) => {
    document.documentElement.dataset.settings = open ? "open" : "closed";
    set(find("#toggle-settings"), "aria-expanded", String(open));
  };
  const settingsOpen = () => document.documentElement.dataset.settings === "open";
  const settle = () => showSettings(WIDE.matches && localStorage.getItem("lmdeck-settings") !== "closed");
  WIDE.addEventListener("change", settle);
  settle();
  // Over the chat, the panel takes the keyboard's focus with it, both ways.
  const coverWithSettings = (open) => {
    const inside = find("#settings")?.contains(document.activeElement);
    showSettings(open);
    if (open) find("#close-settings")?.focus();
    else if (inside) find("#toggle-settings")?.focus();
  };

  document.addEventListener("click", (event) => {
    if (event.target.closest("#toggle-settings")) {
      if (!WIDE.matches) return coverWithSettings(!settingsOpen());
      showSettings(!settingsOpen());
      localStorage.setItem("lmdeck-settings", document.documentElement.dataset.settings);
    } else if (event.target.closest("#close-settings")) {
      coverWithSettings(false);
    } else if (event.target.closest("#lm-theme")) {
      const theme = document.body.classList.contains("dark") ? "light" : "dark";
      localStorage.setItem("lmdeck-theme", theme);
      applyTheme(theme);
    } else if (!WIDE.matches && settingsOpen() && !event.target.closest("#settings")) {
      showSettings(false);
    }
  });

  // Keys. Capturing, so that Gradio never sees an Enter that belongs to an input method or a touch keyboard.
  const onKey = (event) => {
    const composing = event.isComposing || event.keyCode === 229;
    const inComposer = event.target.closest && event.target.closest("#composer textarea");
    if (event.key === "Enter" && inComposer && (composing || (touch.matches && !event.ctrlKey))) {
      event.stopPropagation();
    } else if (event.key === "Escape" && event.type === "keydown" && !composing) {
      const stop = find("#composer .stop-button");
      if (stop) stop.click();
      else if (!WIDE.matches) coverWithSettings(false);
    }
  };
  for (const type of ["keydown", "keypress"]) document.addEventListener(type, onKey, true);

  // A person's "<" carries an invisible mark that keeps it from being read as a tag; copies lose it.
  if (navigator.clipboard) {
    const write = navigator.clipboard.writeText.bind(navigator.clipboard);
    navigator.clipboard.writeText = (words) => write(words.replaceAll("\u2060", ""));
  }

  // Names for what Gradio leaves nameless; called again whenever the page changes.
  function label() {
    set(find("#composer textarea"), "aria-label", say("chat.composer"));
    for (const [selector, key] of [[".submit-button", "chat.send"], [".stop-button", "chat.stop"]]) {
      const button = find(`#composer ${selector}`);
      set(button, "aria-label", say(key));
      set(button, "title", say(key));
    }
    const attach = find("#composer .upload-button");
    if (attach) {
      const refused = Boolean(model && model.name && !model.images);
      const why = refused ? say("chip.text_only", { name: model.name }) : say("chat.attach");
      if (attach.disabled !== refused) attach.disabled = refused;
      set(attach, "aria-label", why);
      set(attach, "title", why);
    }
    for (const button of document.querySelectorAll("#chat-log button.image-button, #chat-log .image-container button")) {
      const image = button.querySelector("img");
      if (image) set(button, "aria-label", image.alt);
    }
    set(find("#toggle-settings"), "aria-expanded", String(settingsOpen()));
    set(find("#toggle-settings"), "aria-controls", "settings");
    set(find("#lm-theme"), "title", say("button.theme"));
    keepEndInSight();
    noticeAnswering();
  }
  let labelling = false;
  new MutationObserver(() => {
    if (labelling) return;
    labelling = true;
    requestAnimationFrame(() => { labelling = false; label(); });
  }).observe(document.documentElement, { childList: true, subtree: true });

  // When the composer grows, a conversation that was at its end stays there.
  let watched = null, height = 0;
  const resized = new ResizeObserver(() => {
    const before = height;
    height = watched.clientHeight;
    const hidden = watched.scrollHeight - watched.scrollTop - before;
    if (height < before && hidden < 40) watched.scrollTop = watched.scrollHeight;
  });
  function keepEndInSight() {
    const log = find("#chat-log .bubble-wrap");
    if (!log || log === watched) return;
    resized.disconnect();
    watched = log;
    height = log.clientHeight;
    resized.observe(log);
  }

  // The header: one short request now and then while the page is visible.
  function show(status) {
    const write = (id, words) => {
      const element = find(id);
      if (element && element.textContent !== words) element.textContent = words;
    };
    set(find("#lm-dot"), "data-phase", status.phase);
    write("#lm-name", status.name || "");
    write("#lm-facts", (status.facts || []).join(" · "));
    write("#lm-words", status.words);
    const adapt = find("#model-changed");
    const changed = status.name && (!model || model.name !== status.name || model.images !== status.images);
    if (!status.name || (changed && adapt)) model = status.name ? status : null;
    if (changed && adapt) adapt.click();
    label();
  }
  // When the view stays behind the conversation for some polls, its event was lost: follow anew.
  let behind = 0, lastShown = null;
  function keepUp(version) {
    const shown = find("#shown-version textarea")?.value ?? "";
    const stuck = version !== null && shown !== "" && Number(shown) !== version && shown === lastShown;
    behind = stuck ? behind + 1 : 0;
    lastShown = shown;
    if (behind >= 2) { behind = 0; find("#refollow")?.click(); }
  }
  // An answer that begins or ends is news: ask at once, and briefly more often, as the engine needs a moment.
  let answering = false, hurried = 0, timer = 0, polling = false;
  function noticeAnswering() {
    if (Boolean(find("#composer .stop-button")) === answering) return;
    answering = !answering;
    hurried = 3;
    if (!polling) { clearTimeout(timer); poll(); }
  }
  async function poll() {
    let wait = POLL_MS;
    polling = true;
    if (document.visibilityState === "visible" && find("#lm-words")) {
      try {
        const id = encodeURIComponent(window.lmdeckConversation || "");
        const status = await (await fetch(`ui/status?conversation=${id}`, { cache: "no-store" })).json();
        if (status.phase === "loading" || status.phase === "busy") wait = POLL_LOADING_MS;
        show(status);
        if (hurried) { hurried -= 1; wait = POLL_HURRIED_MS; }
        else keepUp(status.version);
      } catch {
        show({ phase: "failed", words: say("state.unreachable") });
      }
    } else wait = 200;
    polling = false;
    timer = setTimeout(poll, wait);
  }
  poll();
})();
