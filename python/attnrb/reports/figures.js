
// Pictures: one way to draw them, one look, and buttons that save a picture and its data.
const figures = (() => {
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  // Without Plotly's own bar of buttons, which covers small plots. Dragging zooms, a double click goes back.
  const config = { displaylogo: false, responsive: true, displayModeBar: false };
  const paper = 660; // pixels between the margins of a page
  let printing = false;

  const axis = (own = {}) => ({
    gridcolor: colour("--grid"),
    linecolor: colour("--line"),
    zerolinecolor: colour("--soft"),
    automargin: true,
    ...own,
    title: { standoff: 8, ...own.title },
  });
  const look = (own, width) => ({
    margin: { l: 52, r: 10, t: 8, b: 40 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("--ink"), size: 12, family: getComputedStyle(document.body).fontFamily },
    hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") }, namelength: -1 },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
    showlegend: false,
    ...own,
    ...(printing ? { width } : { autosize: true }),
    xaxis: axis(own.xaxis),
    yaxis: axis(own.yaxis),
  });

  // ------------------------------------------------------------------------------------------------ saving

  const cell = (value) => {
    const text = value === null || value === undefined ? "" : String(value);
    // A spreadsheet would compute what begins like a formula.
    const safe = typeof value === "string" && /^[=+@\t\r-]/.test(text) ? `'${text}` : text;
    return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  // Categories of two levels are two lists side by side.
  const along = (values, place) => (Array.isArray(values?.[0]) ? values.map((each) => each[place]).join(" / ") : values?.[place]);
  const lines = (trace) => {
    if (trace.type === "heatmap")
      return trace.z.flatMap((row, y) => row.map((value, x) => ["", along(trace.x, x) ?? x, along(trace.y, y) ?? y, value]));
    const count = Array.isArray(trace.x?.[0]) ? trace.x[0].length : (trace.x ?? trace.y).length;
    const bars = trace.error_y ?? trace.error_x;
    return Array.from({ length: count }, (_, at) => [
      trace.name ?? "",
      along(trace.x, at) ?? at,
      along(trace.y, at),
      trace.text?.[at],
      bars?.arrayminus?.[at],
      bars?.array?.[at],
    ]);
  };
  const table = (traces) => {
    const heat = traces[0]?.type === "heatmap";
    const head = heat ? ["name", "x", "y", "value"] : ["name", "x", "y", "text", "below", "above"];
    return [head, ...traces.flatMap(lines)].map((line) => line.map(cell).join(",")).join("\r\n") + "\r\n";
  };
  const save = (address, name) => {
    const link = document.createElement("a");
    link.href = address;
    link.download = name;
    link.click();
  };
  const saveData = (name, text, kind) => {
    const address = URL.createObjectURL(new Blob([text], { type: kind }));
    save(address, name);
    setTimeout(() => URL.revokeObjectURL(address), 10_000);
  };
  const fileName = (element) => (element.getAttribute("aria-label") ?? "figure").toLowerCase().replace(/[^a-z0-9]+/g, "-").slice(0, 60);
  const savePicture = async (element) => {
    const { clientWidth: width, clientHeight: height } = element;
    const layout = { ...element.layout, paper_bgcolor: colour("--card"), width, height };
    save(await Plotly.toImage({ data: element.data, layout }, { format: "png", width, height, scale: 2 }), `${fileName(element)}.png`);
  };
  const buttons = (element) => {
    const bar = document.createElement("div");
    bar.className = "save screen";
    const add = (title, act) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = title;
      button.setAttribute("aria-label", `Save ${title}: ${element.getAttribute("aria-label") ?? ""}`);
      button.addEventListener("click", act);
      bar.append(button);
    };
    add("picture", () => savePicture(element));
    add("data", () => saveData(`${fileName(element)}.csv`, table(element.attnrbTraces), "text/csv"));
    element.after(bar);
  };

  // `width` is that on paper, in pixels.
  const draw = (element, traces, layout, width = paper) => {
    const first = element.attnrbTraces === undefined;
    element.attnrbTraces = traces;
    drawPlot(element, traces, look(layout, width), config);
    if (first) buttons(element);
  };
  // Calls `redraw` now and whenever colours or paper change.
  const whenChanged = (redraw) =>
    theme.whenChanged((now) => {
      printing = now;
      redraw();
    });
  // A colour scale for differences: less is blue, more is orange, on every page.
  const change = () => [[0, "#2166ac"], [0.5, document.documentElement.dataset.theme === "dark" ? "#1c2024" : "#ffffff"], [1, "#b35806"]];
  const level = () => (document.documentElement.dataset.theme === "dark" ? { colorscale: "Cividis" } : { colorscale: "YlGnBu", reversescale: true });
  return { draw, whenChanged, colour, change, level, saveData, table };
})();
