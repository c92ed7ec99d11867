
(() => {
  const plots = [...document.querySelectorAll(".plot[data-spec]")].map((element) => ({
    element,
    spec: JSON.parse(document.getElementById(element.dataset.spec).textContent),
  }));
  figures.whenChanged(() => {
    for (const { element, spec } of plots) {
      const traces = spec.data.map((trace) => ({
        ...trace,
        ...(trace.type === "bar" ? { error_y: { ...trace.error_y, color: figures.colour("--ink"), thickness: 1.5 } } : {}),
        ...(trace.colorscale === "change" ? { colorscale: figures.change() } : {}),
      }));
      figures.draw(element, traces, { font: { color: figures.colour("--ink"), size: 13 }, margin: { l: 10, r: 10, t: 10, b: 48 }, ...spec.layout });
    }
  });
})();
