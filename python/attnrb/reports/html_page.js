"use strict";

// Light or dark: as the system has it until the button says otherwise, and light on paper.
const theme = (() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const drawings = [];
  let chosen = null;
  let printing = false;
  const now = () => (printing ? "light" : chosen ?? (system.matches ? "dark" : "light"));
  const set = () => {
    root.dataset.theme = now();
    const other = now() === "dark" ? "Light" : "Dark";
    button.textContent = other;
    button.setAttribute("aria-label", `Switch to ${other.toLowerCase()} colours`);
    for (const draw of drawings) draw(printing);
  };
  button.addEventListener("click", () => {
    chosen = now() === "dark" ? "light" : "dark";
    set();
  });
  system.addEventListener("change", set);
  for (const [event, value] of [["beforeprint", true], ["afterprint", false]]) {
    window.addEventListener(event, () => {
      printing = value;
      set();
    });
  }
  set();
  // What draws pictures is called with whether they are for paper, now and whenever colours change.
  const whenChanged = (draw) => {
    drawings.push(draw);
    draw(printing);
  };
  return { whenChanged };
})();

// Draws with Plotly. Names, categories, texts and titles are shown as they are: Plotly alone would read tags, links and
// entities in them. Only templates, which are a page's own, may hold tags.
const drawPlot = (() => {
  const literal = (value) => {
    if (Array.isArray(value)) return value.map(literal);
    if (typeof value !== "string") return value;
    // Plotly keeps categories in plain objects, where a group named "constructor" is a function: it gets a letter that
    // nobody sees.
    const own = value in Object.prototype ? `${value}\u200b` : value;
    return own.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  };
  const changed = (object, names) => {
    const found = names.filter((name) => object[name] !== undefined);
    return { ...object, ...Object.fromEntries(found.map((name) => [name, literal(object[name])])) };
  };
  const titled = (axis) => ({ ...axis, ...(axis?.title ? { title: changed(axis.title, ["text"]) } : {}) });
  return (element, traces, layout, config) => {
    const texts = traces.map((trace) => changed(trace, ["name", "text", "hovertext", "x", "y"]));
    Plotly.react(element, texts, { ...layout, xaxis: titled(layout.xaxis), yaxis: titled(layout.yaxis) }, config);
  };
})();
