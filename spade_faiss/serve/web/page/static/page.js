// What HTML cannot do by itself: keys, the picture with its map, files that are dropped, light and dark, and trouble in words.
// Everything on the page that matters (look, answer, undo, search, upload) works without this script, too.
(() => {
  "use strict";
  const root = document.documentElement;
  const find = (selector, within = document) => within.querySelector(selector);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  root.classList.add("has-script");

  const say = (text) => {
    const place = find("#announce");
    if (!place || !text) return;
    place.textContent = "";
    setTimeout(() => { place.textContent = text; }, 60); // a live region speaks only when its text changes
  };
  const remembered = (name) => { try { return localStorage.getItem(name); } catch { return null; } };
  const remember = (name, value) => { try { localStorage.setItem(name, value); } catch { /* private windows may forbid it */ } };

  // ---- light and dark: a cookie, so that the server already renders the page as it was chosen
  const isDark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const showTheme = () => find("#theme")?.setAttribute("aria-pressed", String(isDark()));
  const changeTheme = () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    document.cookie = `theme=${root.dataset.theme}; path=/; max-age=31536000; SameSite=Strict`;
    showTheme();
  };

  // ---- trouble: a request that failed is said, and taken back when one succeeds
  let lastAnswer = new Date();
  const trouble = (text) => {
    const place = find("#trouble");
    if (!place) return;
    place.hidden = !text;
    const words = find("p", place);
    if (words.textContent !== text) words.textContent = text;
  };
  const problemOf = (request) => {
    const page = new DOMParser().parseFromString(request.responseText || "", "text/html");
    const said = find("[data-problem]", page)?.textContent.trim().replace(/\s+/g, " ");
    if (said) return said;
    try {
      const problem = JSON.parse(request.responseText);
      return [problem.title, problem.detail].filter(Boolean).join(": ");
    } catch {
      return `The server answered with an error (${request.status}).`;
    }
  };
  document.addEventListener("htmx:sendError", () =>
    trouble(`The server does not answer. What you see is of ${lastAnswer.toLocaleTimeString()}; trying again.`));
  document.addEventListener("htmx:timeout", () => trouble("The server takes too long to answer; trying again."));
  document.addEventListener("htmx:responseError", (event) => trouble(problemOf(event.detail.xhr)));
  document.addEventListener("htmx:afterRequest", (event) => {
    if (!event.detail.successful) return;
    lastAnswer = new Date();
    trouble("");
  });
  document.addEventListener("htmx:beforeSwap", (event) => {
    // A session that has ended answers with the sign-in page, which is a page of its own and no part of this one.
    if (new URL(event.detail.xhr.responseURL || location.href).pathname !== "/login") return;
    event.detail.shouldSwap = false;
    location.assign(`/login?next=${encodeURIComponent(location.pathname + location.search)}`);
  });

  // ---- live parts: not while nobody looks, and not while they are held
  let held = false;
  document.addEventListener("htmx:beforeRequest", (event) => {
    if ("poll" in event.detail.elt.dataset && (held || document.hidden)) event.preventDefault();
  });
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden && !held) for (const part of all("[data-poll]")) window.htmx?.trigger(part, "look");
  });
  const hold = () => {
    held = !held;
    const button = find("#hold");
    button.setAttribute("aria-pressed", String(held));
    say(held ? "Updates are paused." : "Updates go on.");
  };

  // ---- keys: an element says which keys press it; on lists, j and k go from one to the next
  const keysAreOn = () => remembered("keys") !== "off";
  const isTyping = (target) => target.isContentEditable || /^(INPUT|TEXTAREA|SELECT)$/.test(target.tagName);
  const step = (by) => {
    const items = all("[data-item]");
    if (!items.length) return;
    const at = items.indexOf(document.activeElement);
    items[Math.min(Math.max(at + by, 0), items.length - 1)].focus();
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    if (isTyping(event.target)) {
      if (event.key === "Escape" && event.target.type !== "range") event.target.blur();
      if (event.target.type !== "range" && event.target.type !== "checkbox") return;
      if (event.key.startsWith("Arrow")) return;
    }
    if (!keysAreOn() || find("dialog[open]")) return;
    const pressed = all("[data-key]").find((element) => element.dataset.key.split(" ").includes(event.key) && !element.disabled);
    if (pressed) {
      event.preventDefault();
      if (pressed.matches("input[type=search], input[type=text]")) { pressed.focus(); pressed.select(); } else pressed.click();
    } else if (event.key === "j" || event.key === "ArrowRight") step(1);
    else if (event.key === "k" || event.key === "ArrowLeft") step(-1);
  });

  document.addEventListener("click", (event) => {
    const target = event.target.closest("button, [data-region]");
    if (!target) return;
    if (target.id === "theme") changeTheme();
    if (target.id === "hold") hold();
    if (target.id === "help-open") find("#help").showModal();
    if (target.dataset.close !== undefined) target.closest("dialog").close();
  });
  document.addEventListener("change", (event) => {
    if (event.target.id !== "keys-on") return;
    remember("keys", event.target.checked ? "on" : "off");
    say(event.target.checked ? "Keys are on." : "Keys are off.");
  });

  // ---- files that are dropped
  const dropping = (event) => event.target.closest?.("[data-drop]");
  for (const name of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(name, (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault(); // a file beside the place would replace the page
      const form = dropping(event);
      for (const place of all("[data-drop]")) place.classList.toggle("over", name === "dragover" && place === form);
      if (name !== "drop" || !form) return;
      find("input[type=file]", form).files = event.dataTransfer.files;
      form.requestSubmit();
    });
  }
  document.addEventListener("submit", (event) => {
    const form = event.target.closest("[data-drop]");
    if (!form) return;
    const count = find("input[type=file]", form).files.length;
    const words = `Scoring ${count === 1 ? "one picture" : `${count} pictures`} …`;
    find("[data-busy]", form).textContent = words;
    const button = find("[type=submit]", form);
    button.classList.add("busy");
    setTimeout(() => { button.disabled = true; }); // once the form is on its way
    say(words);
  });
  addEventListener("pageshow", (event) => { // back from elsewhere, a page is as it was left
    if (!event.persisted) return;
    for (const button of all("[data-drop] [type=submit]")) {
      button.disabled = false;
      button.classList.remove("busy");
      find("[data-busy]", button.form).textContent = "";
    }
  });

  // ---- the picture and its map
  let half; // the value of each float16
  const halves = () => {
    if (half) return half;
    half = new Float32Array(1 << 16);
    for (let bits = 0; bits < half.length; bits++) {
      const exponent = (bits >> 10) & 31, fraction = bits & 1023;
      const value = exponent === 0 ? fraction * 2 ** -24 : exponent === 31 ? (fraction ? NaN : Infinity) : (1 + fraction / 1024) * 2 ** (exponent - 15);
      half[bits] = bits >> 15 ? -value : value;
    }
    return half;
  };
  const readArray = (buffer) => { // NumPy's .npy, version 1: two dimensions, little-endian float16 or float32, rows first
    const view = new DataView(buffer);
    const length = view.getUint16(8, true);
    const header = new TextDecoder().decode(new Uint8Array(buffer, 10, length));
    const kind = /'descr':\s*'([^']+)'/.exec(header)?.[1];
    const shape = /'shape':\s*\((\d+),\s*(\d+)\)/.exec(header);
    if (view.getUint8(0) !== 0x93 || !shape || !["<f2", "<f4"].includes(kind)) throw new Error("this is no map of scores");
    const [height, width] = [Number(shape[1]), Number(shape[2])];
    const body = buffer.slice(10 + length);
    const values = kind === "<f4" ? new Float32Array(body) : Float32Array.from(new Uint16Array(body), (bits) => halves()[bits]);
    return { height, width, values };
  };

  // Lines where the map crosses a level, by marching squares: along each square of four pixel centers, straight.
  const contour = ({ height, width, values }, level, scale) => {
    const path = new Path2D();
    let above = 0;
    for (const value of values) if (value > level) above++;
    if (!above) return { path, above };
    for (let y = 0; y + 1 < height; y++) {
      for (let x = 0; x + 1 < width; x++) {
        const at = y * width + x;
        const a = values[at], b = values[at + 1], c = values[at + width + 1], d = values[at + width];
        const kind = (a > level) | ((b > level) << 1) | ((c > level) << 2) | ((d > level) << 3);
        if (kind === 0 || kind === 15) continue;
        const mix = (from, to) => (level - from) / (to - from);
        const left = (x + 0.5) * scale, top = (y + 0.5) * scale;
        const sides = {
          n: () => [left + mix(a, b) * scale, top], e: () => [left + scale, top + mix(b, c) * scale],
          s: () => [left + mix(d, c) * scale, top + scale], w: () => [left, top + mix(a, d) * scale],
        };
        for (const [from, to] of LINES[kind]) { path.moveTo(...sides[from]()); path.lineTo(...sides[to]()); }
      }
    }
    return { path, above };
  };
  const LINES = ["", "wn", "ne", "we", "es", "wn es", "ns", "ws", "sw", "ns", "ne sw", "es", "we", "ne", "wn", ""]
    .map((line) => line.split(" ").filter(Boolean));

  const digits = (value, reference) => value.toFixed(Math.min(Math.max(3 - Math.floor(Math.log10(Math.max(reference, 1e-6))), 0), 6));
  const percent = (share) => `${(100 * share).toPrecision(2).replace(/\.0$/, "")} %`;

  // What a threshold promises: the rate of normal pictures that have a pixel above it, by the calibration's n maxima.
  const meaning = (curve, level, reference) => {
    const shown = digits(level, reference);
    if (!curve) return { text: `Outlined: pixels above ${shown}. Without a calibration nobody knows how many normal pictures have such pixels.`, alpha: null };
    let low = 0, high = curve.scores.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (curve.scores[middle] <= level) low = middle + 1; else high = middle;
    }
    const count = low ? curve.above[low - 1] : curve.n;
    const alpha = (count + 1) / (curve.n + 1);
    const seen = count === 0 ? `None of ${curve.n} calibration pictures has` : count === curve.n ? `All ${curve.n} calibration pictures have` : `${count} of ${curve.n} calibration pictures ${count === 1 ? "has" : "have"}`;
    const means = count === curve.n ? "it tells nothing apart" : `as a threshold, it means alpha = ${percent(alpha)}`;
    return { text: `Outlined: pixels above ${shown}. ${seen} such a pixel: ${means}.`, alpha };
  };

  const openViewer = async (stage) => {
    if (stage.dataset.open) return;
    stage.dataset.open = "yes";
    const canvas = find("canvas", stage), output = find("#meaning"), controls = find("#controls");
    const opacity = find("#opacity"), threshold = find("#threshold"), shown = find("#map-on"), marks = find("#marks-on"), reset = find("#reset");
    const curve = JSON.parse(stage.dataset.curve || "null");
    const colors = Uint8Array.from(atob(stage.dataset.colors), (letter) => letter.charCodeAt(0));
    const [low, high] = [Number(stage.dataset.low), Number(stage.dataset.high)];
    let map;
    try {
      const response = await fetch(stage.dataset.values, { credentials: "same-origin" });
      if (!response.ok) throw new Error(`the server answered ${response.status}`);
      map = readArray(await response.arrayBuffer());
    } catch (error) {
      output.textContent = `The map could not be loaded: ${error.message}.`;
      return;
    }
    const heat = document.createElement("canvas");
    [heat.width, heat.height] = [map.width, map.height];
    const context = canvas.getContext("2d"), heatContext = heat.getContext("2d");
    const paintHeat = () => {
      const image = heatContext.createImageData(map.width, map.height), strength = Number(opacity.value) / 100;
      for (let i = 0; i < map.values.length; i++) {
        const share = Math.min(Math.max((map.values[i] - low) / (high - low), 0), 1) || 0, color = Math.round(share * 255) * 3;
        image.data.set([colors[color], colors[color + 1], colors[color + 2], Math.round(255 * strength * Math.sqrt(share))], 4 * i);
      }
      heatContext.putImageData(image, 0, 0);
    };
    let asked = false;
    const draw = () => {
      asked = false;
      const wide = stage.clientWidth * (window.devicePixelRatio || 1);
      const scale = Math.min(Math.max(Math.ceil(wide / map.width), 1), Math.max(1, Math.floor(2600 / Math.max(map.width, map.height))));
      if (canvas.width !== map.width * scale || canvas.height !== map.height * scale) {
        [canvas.width, canvas.height] = [map.width * scale, map.height * scale];
      }
      context.clearRect(0, 0, canvas.width, canvas.height);
      const level = Number(threshold.value);
      const { path, above } = contour(map, level, scale);
      if (shown.checked) {
        context.imageSmoothingQuality = "high";
        context.drawImage(heat, 0, 0, canvas.width, canvas.height);
        const unit = Math.max(1, canvas.width / Math.max(stage.clientWidth, 1));
        context.lineJoin = context.lineCap = "round";
        for (const [color, width] of [["rgb(0 0 0 / 80%)", 4.5], ["#5ae6ff", 2]]) {
          context.strokeStyle = color;
          context.lineWidth = width * unit;
          context.stroke(path);
        }
      }
      const said = meaning(curve, level, high);
      output.textContent = `${said.text} ${above ? `They cover ${percent(above / map.values.length)} of the picture.` : "This picture has none."}`;
      threshold.setAttribute("aria-valuetext", `${digits(level, high)}${said.alpha === null ? "" : `, alpha ${percent(said.alpha)}`}`);
      opacity.setAttribute("aria-valuetext", `${opacity.value} percent`);
      find("#threshold-value").textContent = digits(level, high);
      find("#opacity-value").textContent = `${opacity.value} %`;
      canvas.dataset.above = above;
      if (said.alpha !== null) canvas.dataset.alpha = said.alpha;
    };
    const ask = () => { if (!asked) { asked = true; requestAnimationFrame(draw); } };
    opacity.value = remembered("opacity") || opacity.value;
    opacity.addEventListener("input", () => { remember("opacity", opacity.value); paintHeat(); ask(); });
    threshold.addEventListener("input", ask);
    shown.addEventListener("change", ask);
    marks.addEventListener("change", () => { find("svg", stage).toggleAttribute("hidden", !marks.checked); });
    reset.addEventListener("click", () => { threshold.value = threshold.defaultValue; ask(); say(output.textContent); });
    for (const row of all("[data-region]")) {
      const pick = (on) => find(`#region-${row.dataset.region}`, stage)?.classList.toggle("picked", on);
      for (const [name, on] of [["mouseenter", true], ["mouseleave", false], ["focusin", true], ["focusout", false]]) row.addEventListener(name, () => pick(on));
    }
    new ResizeObserver(ask).observe(stage);
    controls.disabled = false;
    paintHeat();
    draw();
    stage.dataset.ready = "yes";
  };

  // ---- each time that the page, or its main part, is new
  const start = () => {
    showTheme();
    const keys = find("#keys-on");
    if (keys) keys.checked = keysAreOn();
    for (const stage of all("[data-values]")) openViewer(stage);
    find(".rail [aria-current]")?.scrollIntoView({ block: "nearest", inline: "nearest" });
    const told = all("[data-tell]").map((element) => element.textContent.trim().replace(/\s+/g, " ")).join(" ");
    if (told) say(told);
  };
  document.addEventListener("DOMContentLoaded", start);
  document.addEventListener("htmx:afterSettle", (event) => {
    if (event.detail.elt.id !== "main" && event.detail.target?.id !== "main") {
      const told = event.detail.elt.dataset?.told; // a part that says itself what is new in it
      if (told) say(told);
      return;
    }
    start();
    if (document.activeElement === document.body || !document.activeElement) find("h1")?.focus({ preventScroll: true });
    scrollTo(0, 0);
  });
})();
