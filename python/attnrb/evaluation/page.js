
(() => {
  const plots = [...document.querySelectorAll(".plot")].map((element) => ({
    element,
    spec: JSON.parse(document.getElementById(element.dataset.spec).textContent),
  }));
  const config = { responsive: true, displaylogo: false, displayModeBar: false };
  const paper = 660; // pixels between the margins of a page
  theme.whenChanged((printing) => {
    const style = getComputedStyle(document.documentElement);
    const [ink, grid] = ["--ink", "--line"].map((name) => style.getPropertyValue(name).trim());
    for (const { element, spec } of plots) {
      const axis = { gridcolor: grid, zerolinecolor: ink, linecolor: grid, automargin: true };
      const layout = {
        margin: { l: 10, r: 10, t: 10, b: 48 },
        paper_bgcolor: "transparent",
        plot_bgcolor: "transparent",
        font: { color: ink, size: 13 },
        hoverlabel: { namelength: -1 },
        legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
        ...spec.layout,
        ...(printing ? { width: paper } : { autosize: true }),
        xaxis: { ...axis, ...spec.layout.xaxis },
        yaxis: { ...axis, ...spec.layout.yaxis },
      };
      const errors = (trace) => ({
        ...trace,
        ...(trace.type === "bar" ? { error_y: { ...trace.error_y, color: ink, thickness: 1.5 } } : {}),
      });
      drawPlot(element, spec.data.map(errors), layout, config);
    }
  });
})();
