
// The text: shaded by what tokens receive, or by where one of them looks.
const text = (() => {
  const { data, byId, floats, percent, signed, times, layerName, layerPlace, state, head, where, many } = shared;
  const root = document.documentElement;
  const view = byId("text");
  const tip = byId("tip");
  const SHADES = 40;
  const PIECE = 1000; // tokens that are shaded at a time, out of sight
  let spans = [];
  let looks = []; // how each token is shown at present
  let wanted = { strength: () => 0, marked: () => false }; // how they are to be shown
  let left = []; // the tokens of which that is not written yet
  let listeners = [];

  // Received attention of one text: rows are all layers averaged, then each layer; single heads where they are kept.
  const unpacked = new Map();
  const arrays = (run) => {
    const key = `${run} ${state.text}`;
    if (!unpacked.has(key)) {
      const packed = data.runs[run].texts[state.text];
      const found = Object.fromEntries(Object.entries(packed).map(([name, value]) => [name, value === null ? null : floats(value)]));
      unpacked.set(key, found);
    }
    return unpacked.get(key);
  };
  // What tokens receive in single heads is left out of long pages, where rows of queries may still have them.
  const single = () => head() >= 0 && data.texts[state.text].by_head;
  const place = () => (!single() ? state.layer : layerPlace() * data.detail.heads.length + data.detail.heads.indexOf(head()));
  const row = (kind, run) => {
    const n = data.texts[state.text].token.length;
    const own = arrays(run)[single() ? `${kind}_by_head` : kind];
    const width = kind === "scale" ? 2 : n;
    return own.subarray(place() * width, (place() + 1) * width);
  };
  // How many times what a token in its place is expected to receive.
  const factors = (run) => {
    const [centre, spread] = row("scale", run);
    return Float32Array.from(row("z", run), (z) => Math.exp(z * spread + centre));
  };

  const showText = () => {
    const text = data.texts[state.text];
    const parts = document.createDocumentFragment();
    const some = rows.queries().length < text.token.length;
    spans = text.token.map((token, index) => {
      const span = document.createElement("span");
      const shown = text.shown[index];
      // Text from tokens only ever becomes a text node.
      span.textContent = shown;
      span.className = shown.trim() === "" || /^[⏎\s]+$/.test(shown) ? "t invisible" : "t";
      if (some && rows.has(index)) span.classList.add("has-row");
      span.dataset.index = index;
      parts.append(span);
      return span;
    });
    looks = [];
    left = [];
    view.replaceChildren(parts);
    state.current = -1;
    state.query = -1;
    byId("head").disabled = !text.by_head && !text.rows && !data.detail.served;
    if (byId("head").disabled) {
      state.head = -1;
      byId("head").value = "-1";
    }
    byId("no-heads").hidden = text.by_head;
  };

  // How each token is shaded, from -1 to 1, which of them are marked, and what the ends of the scale mean.
  const byReceived = () => {
    const z = row("z", state.run);
    const marked = (index) => !state.change && z[index] > data.z_threshold;
    if (state.change) {
      const [before, now] = [row("received", 0), row("received", state.run)];
      const logs = Float32Array.from(now, (value, index) => Math.log2(Math.max(value, 1e-30) / Math.max(before[index], 1e-30)));
      const most = logs.reduce((so_far, value) => Math.max(so_far, Math.abs(value)), 0.05);
      return { strength: (index) => logs[index] / most, marked, low: `÷ ${(2 ** most).toFixed(2)}`, high: `× ${(2 ** most).toFixed(2)}` };
    }
    // Plain and edited have one scale.
    const own = factors(state.run);
    let most = 1.01;
    data.runs.forEach((_, run) => (most = factors(run).reduce((so_far, value) => Math.max(so_far, value), most)));
    const range = Math.log(most);
    return { strength: (index) => Math.log(own[index]) / range, marked, low: "as expected here, or less", high: `${times(most)} of it` };
  };
  const byQuery = () => {
    const found = data.runs.map((_, run) => rows.now(run));
    const weights = found.map((row) => new Map(row.entries.map((each) => [each.key, each.weight])));
    const outliers = new Set(found.flatMap((row) => row.entries.filter((each) => each.outlier).map((each) => each.key)));
    const marked = (index) => outliers.has(index);
    if (state.change) {
      const last = weights.length - 1;
      const changes = new Map();
      for (const key of new Set([...weights[0].keys(), ...weights[last].keys()]))
        if (weights[0].has(key) && weights[last].has(key)) changes.set(key, weights[last].get(key) - weights[0].get(key));
      const most = Math.max(1e-6, ...[...changes.values()].map(Math.abs));
      return { strength: (index) => (changes.get(index) ?? 0) / most, marked, low: percent(-most), high: signed(most) };
    }
    const most = Math.max(1e-6, ...weights.flatMap((each) => [...each.values()]));
    return { strength: (index) => Math.sqrt((weights[state.run].get(index) ?? 0) / most), marked, low: "0", high: percent(most) };
  };

  // Most tokens keep their shade from one layer to the next: only what changed is written.
  const write = (index) => {
    const value = Math.max(state.change ? -1 : 0, Math.min(1, wanted.strength(index)));
    const shade = Math.round(SHADES * Math.abs(value));
    const tone = !state.change || shade === 0 ? "" : value < 0 ? "less" : "more";
    const outlier = wanted.marked(index);
    const look = `${shade} ${tone} ${outlier} ${index === state.query}`;
    if (looks[index] === look) return;
    looks[index] = look;
    const span = spans[index];
    span.style.setProperty("--a", shade / SHADES);
    if (tone) span.style.setProperty("--tone", `var(--${tone})`);
    else span.style.removeProperty("--tone");
    span.classList.toggle("outlier", outlier);
    span.classList.toggle("query", index === state.query);
  };
  // The first token that ends below a height in the window. Tokens follow each other down the text.
  const firstBelow = (height) => {
    let [low, high] = [0, spans.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (spans[middle].getBoundingClientRect().bottom > height) high = middle;
      else low = middle + 1;
    }
    return low;
  };
  // A browser takes 0.1 s to style 8,000 tokens: those in sight are written at once, the others a piece at a time.
  const writeAll = () => {
    const frame = view.getBoundingClientRect();
    const [from, to] = spans.length <= PIECE ? [0, spans.length] : [firstBelow(Math.max(0, frame.top)), firstBelow(Math.min(window.innerHeight, frame.bottom)) + 50];
    const started = left.length > 0;
    left = [];
    spans.forEach((_, index) => {
      if ((index >= from && index < to) || index === state.query) write(index);
      else left.push(index);
    });
    if (!started && left.length) setTimeout(writeLeft, 0);
  };
  const writeLeft = (count = PIECE) => {
    left.splice(0, count).forEach(write);
    if (left.length) setTimeout(writeLeft, 0);
  };
  theme.whenChanged(() => left.splice(0).forEach(write)); // paper has all of it

  const shade = () => {
    byId("layer-name").textContent = layerName(state.layer);
    byId("layer").setAttribute("aria-valuetext", layerName(state.layer));
    const asQuery = state.query >= 0 && rows.has(state.query) && rows.covered();
    wanted = asQuery ? byQuery() : byReceived();
    byId("low").textContent = wanted.low;
    byId("high").textContent = wanted.high;
    byId("scale").className = state.change ? "scale change" : "scale level";
    byId("mark-means").textContent = asQuery ? "outlier of this token in the source layer" : "outlier token";
    writeAll();
    if (state.current >= 0) showTip(state.current);
    for (const told of listeners) told();
  };
  let waiting = false;
  const shadeSoon = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      shade();
    });
  };

  // ------------------------------------------------------------------------------------------------ what a token is

  const entry = (list, name, value) => {
    const term = document.createElement("dt");
    const detail = document.createElement("dd");
    term.textContent = name;
    detail.textContent = value;
    list.append(term, detail);
  };
  const named = (index) => (data.texts[state.text].token[index] === "" ? "(continues a character)" : data.texts[state.text].visible[index]);

  const showTip = (index) => {
    const text = data.texts[state.text];
    const title = document.createElement("b");
    title.textContent = named(index);
    const list = document.createElement("dl");
    entry(list, "token", `${index.toLocaleString("en")} of ${spans.length.toLocaleString("en")}, id ${text.id[index]}`);
    entry(list, "class", text.token_class[index].replace("_", " "));
    if (state.query >= 0 && rows.has(state.query) && rows.covered())
      data.runs.forEach((run, which) => {
        const found = rows.now(which).entries.find((each) => each.key === index);
        entry(list, many ? `looked at, ${run.label}` : "looked at", found ? percent(found.weight) : "among the rest");
      });
    const heads = head() >= 0 && !single() ? ", all heads" : "";
    data.runs.forEach((run, which) => {
      entry(list, (many ? `received, ${run.label}` : "received") + heads, percent(row("received", which)[index]));
    });
    const [centre, spread] = row("scale", state.run);
    const z = row("z", state.run)[index];
    entry(list, "of what is expected here", times(Math.exp(z * spread + centre)));
    entry(list, "robust z-score", z.toFixed(2));
    entry(list, "in", where());
    tip.replaceChildren(title, list);
    tip.hidden = false;
    putTip();
  };
  // Beside its token; hidden while that is scrolled out of sight.
  const putTip = () => {
    if (state.current < 0) return;
    const box = spans[state.current].getClientRects()[0] || spans[state.current].getBoundingClientRect();
    const frame = view.getBoundingClientRect();
    const seen = box.bottom > Math.max(0, frame.top) && box.top < Math.min(window.innerHeight, frame.bottom);
    tip.style.visibility = seen ? "visible" : "hidden";
    if (!seen) return;
    const size = tip.getBoundingClientRect();
    const left = Math.max(8, Math.min(box.left, root.clientWidth - size.width - 8));
    const above = box.top - size.height - 8;
    tip.style.left = `${left}px`;
    tip.style.top = `${above >= 8 ? above : Math.min(box.bottom + 8, window.innerHeight - size.height - 8)}px`;
  };
  // The page's own scrolling, and that of the text.
  document.addEventListener("scroll", putTip, { capture: true, passive: true });
  window.addEventListener("resize", putTip);

  const select = (index, scroll) => {
    if (state.current >= 0 && spans[state.current]) spans[state.current].classList.remove("current");
    state.current = index;
    if (index < 0) {
      tip.hidden = true;
      return;
    }
    spans[index].classList.add("current");
    if (scroll) spans[index].scrollIntoView({ block: "nearest" });
    showTip(index);
  };
  // Shows where a token looks; -1 goes back to what tokens receive.
  const ask = (index) => {
    if (index === state.query) return;
    state.query = index;
    if (index < 0) shade();
    else rows.need(index, () => shade());
  };

  const tokenAt = (event) => {
    const span = event.target instanceof Element ? event.target.closest(".t") : null;
    return span ? Number(span.dataset.index) : -1;
  };
  view.addEventListener("pointerover", (event) => {
    const index = tokenAt(event);
    if (index >= 0 && event.pointerType !== "touch") select(index, false);
  });
  view.addEventListener("pointerleave", (event) => {
    if (event.pointerType !== "touch") select(-1, false);
  });
  view.addEventListener("click", (event) => {
    const index = tokenAt(event);
    select(index, false);
    if (index >= 0) ask(index);
  });
  view.addEventListener("blur", () => select(-1, false));
  document.addEventListener("pointerdown", (event) => {
    if (!view.contains(event.target)) select(-1, false);
  });
  view.addEventListener("keydown", (event) => {
    const last = spans.length - 1;
    const walk = (step, fits) => {
      let next = state.current + step;
      while (next >= 0 && next <= last && !fits(next)) next += step;
      return next < 0 || next > last ? null : next;
    };
    const steps = {
      ArrowRight: () => Math.min(last, state.current + 1),
      ArrowLeft: () => Math.max(0, state.current - 1),
      Home: () => 0,
      End: () => last,
      n: () => walk(1, wanted.marked),
      p: () => walk(-1, wanted.marked),
      "]": () => walk(1, rows.has),
      "[": () => walk(-1, rows.has),
    };
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") {
      if (state.current >= 0) select(-1, false);
      else ask(-1);
    } else if (event.key === "Enter") {
      if (state.current >= 0) ask(state.current);
    } else if (event.key in steps) {
      const next = steps[event.key]();
      if (next === null) return;
      select(next, true);
    } else return;
    event.preventDefault();
  });

  // ------------------------------------------------------------------------------------------------ controls

  byId("layer").addEventListener("input", (event) => {
    state.layer = Number(event.target.value);
    shadeSoon();
  });
  byId("head").addEventListener("change", (event) => {
    state.head = Number(event.target.value);
    shadeSoon();
  });
  byId("which")?.addEventListener("change", (event) => {
    state.change = event.target.value === "change";
    state.run = state.change ? data.runs.length - 1 : Number(event.target.value);
    shadeSoon();
  });
  byId("which-text")?.addEventListener("change", (event) => {
    state.text = Number(event.target.value);
    showText();
    shade();
  });
  const go = (layer, ownHead) => {
    state.layer = layer;
    state.head = ownHead;
    byId("layer").value = String(layer);
    byId("head").value = String(ownHead);
    shade();
  };
  return { showText, shade, ask, named, go, whenShaded: (told) => listeners.push(told) };
})();
