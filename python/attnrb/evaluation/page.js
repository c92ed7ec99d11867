"use strict";
const dark = matchMedia("(prefers-color-scheme: dark)");
function draw() {
  const ink = dark.matches ? "#e8eaed" : "#1b1f24";
  const grid = dark.matches ? "#343a41" : "#dfe2e6";
  for (const element of document.querySelectorAll(".plot")) {
    const spec = JSON.parse(document.getElementById(element.dataset.spec).textContent);
    const axis = { gridcolor: grid, zerolinecolor: ink, linecolor: grid, automargin: true };
    const layout = {
      margin: { l: 10, r: 10, t: 10, b: 40 }, paper_bgcolor: "transparent", plot_bgcolor: "transparent",
      font: { color: ink, size: 13 }, hoverlabel: { namelength: -1 }, legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
      ...spec.layout,
      xaxis: { ...axis, ...spec.layout.xaxis }, yaxis: { ...axis, ...spec.layout.yaxis },
    };
    Plotly.react(element, spec.data, layout, { responsive: true, displaylogo: false, displayModeBar: false });
  }
}
draw();
dark.addEventListener("change", draw);
