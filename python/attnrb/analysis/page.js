
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);
  const many = data.runs.length > 1;

  // ------------------------------------------------------------------------------------------------ numbers

  const floats = (base64) => {
    const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
    return new Float32Array(bytes.buffer);
  };
  const percent = (share) => {
    if (!(share >= 0)) return "–";
    const value = 100 * share;
    return `${value >= 10 ? value.toFixed(1) : value >= 0.001 || value === 0 ? value.toPrecision(3) : value.toExponential(1)} %`;
  };
  const layerName = (index) => (index === 0 ? "all layers" : `layer ${data.layers[index - 1]}`);

  // Received attention of one text: rows are all layers averaged, then each layer; each has its heads where kept.
  const unpacked = new Map();
  const received = (run, text) => {
    const key = `${run} ${text}`;
    if (!unpacked.has(key)) {
      const packed = data.runs[run].texts[text];
      const arrays = {};
      for (const name of Object.keys(packed)) arrays[name] = packed[name] === null ? null : floats(packed[name]);
      unpacked.set(key, arrays);
    }
    return unpacked.get(key);
  };
  const row = (kind, run) => {
    const arrays = received(run, state.text);
    const n = data.texts[state.text].token.length;
    if (state.head < 0) return arrays[kind].subarray(state.layer * n, (state.layer + 1) * n);
    const place = state.layer * data.heads + state.head;
    return arrays[`${kind}_by_head`].subarray(place * n, (place + 1) * n);
  };

  // ------------------------------------------------------------------------------------------------ the text

  const state = { text: 0, run: 0, layer: 0, head: -1, current: -1, change: false };
  const view = byId("text");
  const tip = byId("tip");
  const SHADES = 40;
  let spans = [];
  let looks = []; // how each token is shown at present

  const showText = () => {
    const text = data.texts[state.text];
    const parts = document.createDocumentFragment();
    spans = text.token.map((token, index) => {
      const span = document.createElement("span");
      const shown = text.shown[index];
      // Text from tokens only ever becomes a text node.
      span.textContent = shown;
      span.className = shown.trim() === "" || /^[⏎\s]+$/.test(shown) ? "t invisible" : "t";
      span.dataset.index = index;
      parts.append(span);
      return span;
    });
    looks = [];
    view.replaceChildren(parts);
    state.current = -1;
    byId("head").disabled = !text.by_head;
    if (!text.by_head) {
      state.head = -1;
      byId("head").value = "-1";
    }
    byId("no-heads").hidden = text.by_head;
  };

  const median = (values) => {
    const sorted = Float32Array.from(values).sort();
    return sorted[sorted.length >> 1];
  };

  const shade = () => {
    const now = row("received", state.run);
    const scores = row("z", state.run);
    byId("layer-name").textContent = layerName(state.layer);
    byId("layer").setAttribute("aria-valuetext", layerName(state.layer));
    let strength;
    if (state.change) {
      const before = row("received", 0);
      const logs = Float32Array.from(now, (value, index) => Math.log2(Math.max(value, 1e-30) / Math.max(before[index], 1e-30)));
      const most = logs.reduce((so_far, value) => Math.max(so_far, Math.abs(value)), 0.05);
      strength = (index) => Math.max(-1, Math.min(1, logs[index] / most));
      byId("low").textContent = `÷ ${(2 ** most).toFixed(2)}`;
      byId("high").textContent = `× ${(2 ** most).toFixed(2)}`;
    } else {
      const low = median(now);
      const high = now.reduce((so_far, value) => Math.max(so_far, value), 0);
      const range = Math.log(high / Math.max(low, 1e-30)) || 1;
      strength = (index) => Math.max(0, Math.min(1, Math.log(Math.max(now[index], 1e-30) / Math.max(low, 1e-30)) / range));
      byId("low").textContent = `${percent(low)} (median and below)`;
      byId("high").textContent = percent(high);
    }
    byId("scale").className = state.change ? "scale change" : "scale level";
    // Most tokens of a long text keep their shade from one layer to the next: only what changed is written.
    spans.forEach((span, index) => {
      const value = strength(index);
      const shade = Math.round(SHADES * Math.abs(value));
      const tone = !state.change || shade === 0 ? "" : value < 0 ? "less" : "more";
      const outlier = !state.change && scores[index] > data.z_threshold;
      const look = `${shade} ${tone} ${outlier}`;
      if (looks[index] === look) return;
      looks[index] = look;
      span.style.setProperty("--a", shade / SHADES);
      if (tone) span.style.setProperty("--tone", `var(--${tone})`);
      else span.style.removeProperty("--tone");
      span.classList.toggle("outlier", outlier);
    });
    if (state.current >= 0) showTip(state.current);
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

  // ------------------------------------------------------------------------------------------------ hover

  const entry = (list, name, value) => {
    const term = document.createElement("dt");
    const detail = document.createElement("dd");
    term.textContent = name;
    detail.textContent = value;
    list.append(term, detail);
  };

  const showTip = (index) => {
    const text = data.texts[state.text];
    const title = document.createElement("b");
    title.textContent = text.token[index] === "" ? "(continues a character)" : text.visible[index];
    const list = document.createElement("dl");
    const where = layerName(state.layer) + (state.head < 0 ? "" : `, head ${state.head}`);
    entry(list, "token", `${index.toLocaleString("en")} of ${spans.length.toLocaleString("en")}, id ${text.id[index]}`);
    entry(list, "class", text.token_class[index].replace("_", " "));
    data.runs.forEach((run, place) => {
      entry(list, many ? `received, ${run.label}` : "received", percent(row("received", place)[index]));
    });
    entry(list, "robust z-score", row("z", state.run)[index].toFixed(2));
    entry(list, "in", where);
    tip.replaceChildren(title, list);
    tip.hidden = false;
    const box = spans[index].getClientRects()[0] || spans[index].getBoundingClientRect();
    const size = tip.getBoundingClientRect();
    const left = Math.max(8, Math.min(box.left, root.clientWidth - size.width - 8));
    const above = box.top - size.height - 8;
    tip.style.left = `${left}px`;
    tip.style.top = `${above >= 8 ? above : Math.min(box.bottom + 8, window.innerHeight - size.height - 8)}px`;
  };

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
  view.addEventListener("click", (event) => select(tokenAt(event), false));
  view.addEventListener("blur", () => select(-1, false));
  document.addEventListener("pointerdown", (event) => {
    if (!view.contains(event.target)) select(-1, false);
  });
  view.addEventListener("scroll", () => {
    if (state.current >= 0) showTip(state.current);
  });
  view.addEventListener("keydown", (event) => {
    const last = spans.length - 1;
    const isOutlier = (index) => spans[index].classList.contains("outlier");
    let next = state.current;
    if (event.key === "ArrowRight") next = Math.min(last, next + 1);
    else if (event.key === "ArrowLeft") next = Math.max(0, next - 1);
    else if (event.key === "Home") next = 0;
    else if (event.key === "End") next = last;
    else if (event.key === "Escape") next = -1;
    else if (event.key === "n") {
      for (next += 1; next <= last && !isOutlier(next); next += 1);
      if (next > last) return;
    } else if (event.key === "p") {
      for (next -= 1; next >= 0 && !isOutlier(next); next -= 1);
      if (next < 0) return;
    } else return;
    event.preventDefault();
    select(next, true);
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
  const choice = byId("which");
  if (choice)
    choice.addEventListener("change", (event) => {
      state.change = event.target.value === "change";
      state.run = state.change ? data.runs.length - 1 : Number(event.target.value);
      shadeSoon();
    });
  const texts = byId("which-text");
  if (texts)
    texts.addEventListener("change", (event) => {
      state.text = Number(event.target.value);
      showText();
      shade();
    });
  for (const button of document.querySelectorAll("button.more"))
    button.addEventListener("click", () => {
      for (const line of button.closest("section").querySelectorAll(`tr.more[data-run="${button.dataset.run}"]`)) line.hidden = false;
      button.remove();
    });

  // ------------------------------------------------------------------------------------------------ plots

  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  // Without the bar of buttons, which covers small plots. Dragging zooms, a double click goes back.
  const config = { displaylogo: false, responsive: true, displayModeBar: false };
  const plotWidth = { now: null };
  const base = (extra) => ({
    autosize: plotWidth.now === null,
    ...(plotWidth.now === null ? {} : { width: plotWidth.now }),
    margin: { l: 52, r: 10, t: 8, b: 40 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("--ink"), size: 12, family: getComputedStyle(document.body).fontFamily },
    showlegend: false,
    hovermode: "x unified",
    hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
    ...extra,
  });
  const axis = (title, extra) => ({
    title: { text: title, standoff: 8 },
    gridcolor: colour("--grid"),
    linecolor: colour("--line"),
    zeroline: false,
    automargin: true,
    ...extra,
  });
  const isShare = (name) => data.metrics[name].unit === "share";
  const draw = (element, traces, layout) => drawPlot(element, traces, layout, config);

  const drawDepth = () => {
    for (const element of document.querySelectorAll(".depth")) {
      const name = element.dataset.metric;
      const traces = data.runs.map((run, place) => ({
        x: data.layers,
        y: run.layer_means[name],
        name: run.label,
        mode: "lines+markers",
        marker: { size: 4 },
        line: { color: colour(`--run-${place}`), width: 2, dash: place === 0 || data.runs.length === 1 ? "solid" : "dash" },
        hovertemplate: isShare(name) ? "%{y:.2%}" : "%{y:.4g}",
      }));
      const range = isShare(name) ? { tickformat: ".0%", rangemode: "tozero" } : { rangemode: "tozero" };
      draw(element, traces, base({ xaxis: axis("layer"), yaxis: axis("", range) }));
    }
  };

  const drawClasses = () => {
    for (const element of document.querySelectorAll(".classes")) {
      const run = data.runs[Number(element.dataset.run)];
      const traces = data.classes.map((each) => ({
        type: "bar",
        x: data.layers,
        y: run.layer_means[`token_class.${each.name}`],
        name: each.name.replace("_", " "),
        marker: { color: each.colour },
        hovertemplate: "%{y:.2%}",
      }));
      const layout = { barmode: "stack", bargap: 0.12, xaxis: axis("layer"), yaxis: axis("", { tickformat: ".0%", range: [0, 1] }) };
      draw(element, traces, base(layout));
    }
  };

  const drawHeads = () => {
    const name = byId("metric").value;
    const share = isShare(name);
    const numbers = data.runs.flatMap((run) => run.by_head[name].flat()).filter((value) => value !== null);
    const top = numbers.reduce((so_far, value) => Math.max(so_far, value), 0);
    const dark = root.dataset.theme === "dark";
    for (const element of document.querySelectorAll(".head-map")) {
      const which = element.dataset.run;
      let values;
      let scale = { colorscale: dark ? "Cividis" : "YlGnBu", reversescale: !dark, zmin: 0, zmax: top || 1 };
      if (which === "change") {
        const [first, last] = [data.runs[0], data.runs[data.runs.length - 1]].map((run) => run.by_head[name]);
        values = last.map((line, at) => line.map((value, head) => (value === null || first[at][head] === null ? null : value - first[at][head])));
        const most = values.flat().reduce((so_far, value) => Math.max(so_far, Math.abs(value ?? 0)), 1e-9);
        const middle = dark ? "#1c2024" : "#ffffff";
        scale = { colorscale: [[0, "#2166ac"], [0.5, middle], [1, "#b35806"]], zmin: -most, zmax: most };
      } else values = data.runs[Number(which)].by_head[name];
      const format = which === "change" ? (share ? "+.2%" : "+.4g") : share ? ".2%" : ".4g";
      const trace = {
        type: "heatmap",
        x: Array.from({ length: data.heads }, (_, head) => head),
        y: data.layers,
        z: values,
        ...scale,
        hoverongaps: false,
        colorbar: { thickness: 10, outlinewidth: 0, tickformat: share ? (which === "change" ? "+.0%" : ".0%") : "" },
        hovertemplate: `layer %{y}, head %{x}: %{z:${format}}<extra></extra>`,
      };
      const layout = { hovermode: "closest", xaxis: axis("head", { showgrid: false }), yaxis: axis("layer", { showgrid: false }) };
      draw(element, [trace], base(layout));
    }
  };
  byId("metric").addEventListener("change", drawHeads);

  const drawAll = () => {
    drawDepth();
    drawClasses();
    drawHeads();
  };

  if (data.texts.length) {
    showText();
    shade();
  }
  theme.whenChanged((printing) => {
    plotWidth.now = printing ? 320 : null;
    drawAll();
  });
  root.dataset.ready = "true";
})();
