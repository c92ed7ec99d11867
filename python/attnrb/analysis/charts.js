
// Lines over the layers, classes of tokens, and heat maps of heads.
(() => {
  const { data, byId, many } = shared;
  const last = data.runs.length - 1;
  const isShare = (name) => data.metrics[name].unit === "share";
  const narrow = 320; // pixels on paper
  const less = (after, before) => after.map((value, at) => (value === null || before[at] === null ? null : value - before[at]));

  // Where the lines of two runs coincide, the bars below still tell them apart.
  const drawDepth = () => {
    for (const element of document.querySelectorAll(".depth")) {
      const name = element.dataset.metric;
      const share = isShare(name);
      const traces = data.runs.map((run, place) => ({
        x: data.layers,
        y: run.layer_means[name],
        name: run.label,
        mode: "lines+markers",
        marker: { size: 4 },
        line: { color: figures.colour(`--run-${place}`), width: 2, dash: place === 0 ? "solid" : "dash" },
        hovertemplate: share ? "%{y:.2%}" : "%{y:.4g}",
      }));
      const layout = {
        hovermode: "x unified",
        xaxis: { title: { text: "layer" } },
        yaxis: { rangemode: "tozero", zeroline: false, ...(share ? { tickformat: ".0%" } : {}) },
      };
      if (many) {
        traces.push({
          type: "bar",
          x: data.layers,
          y: less(data.runs[last].layer_means[name], data.runs[0].layer_means[name]),
          name: `change, ${data.runs[0].label} to ${data.runs[last].label}`,
          yaxis: "y2",
          marker: { color: figures.colour(`--run-${last}`) },
          hovertemplate: share ? "%{y:+.2%}" : "%{y:+.4g}",
        });
        layout.yaxis.domain = [0.4, 1];
        layout.xaxis.anchor = "y2";
        layout.yaxis2 = {
          domain: [0, 0.28],
          gridcolor: figures.colour("--grid"),
          zerolinecolor: figures.colour("--soft"),
          automargin: true,
          nticks: 3,
          tickformat: share ? "+.1%" : "+.2g",
        };
      }
      figures.draw(element, traces, layout, narrow);
    }
  };

  const drawClasses = () => {
    for (const element of document.querySelectorAll(".classes")) {
      const change = element.dataset.run === "change";
      const traces = data.classes.map((each) => {
        const name = `token_class.${each.name}`;
        return {
          type: "bar",
          x: data.layers,
          y: change ? less(data.runs[last].layer_means[name], data.runs[0].layer_means[name]) : data.runs[Number(element.dataset.run)].layer_means[name],
          name: each.name.replace("_", " "),
          marker: { color: each.colour },
          hovertemplate: change ? "%{y:+.2%}" : "%{y:.2%}",
        };
      });
      const yaxis = change ? { tickformat: "+.1%" } : { tickformat: ".0%", range: [0, 1], zeroline: false };
      const layout = { barmode: change ? "relative" : "stack", bargap: 0.12, hovermode: "x unified", xaxis: { title: { text: "layer" } }, yaxis };
      figures.draw(element, traces, layout, narrow);
    }
  };

  const drawHeads = () => {
    const name = byId("metric").value;
    const share = isShare(name);
    // Runs have one scale.
    const numbers = data.runs.flatMap((run) => run.by_head[name].flat()).filter((value) => value !== null);
    const top = numbers.reduce((so_far, value) => Math.max(so_far, value), 0);
    for (const element of document.querySelectorAll(".head-map")) {
      const change = element.dataset.run === "change";
      let values;
      let scale = { ...figures.level(), zmin: 0, zmax: top || 1 };
      if (change) {
        values = data.runs[last].by_head[name].map((line, at) => less(line, data.runs[0].by_head[name][at]));
        const most = values.flat().reduce((so_far, value) => Math.max(so_far, Math.abs(value ?? 0)), 1e-9);
        scale = { colorscale: figures.change(), zmin: -most, zmax: most };
      } else values = data.runs[Number(element.dataset.run)].by_head[name];
      const format = change ? (share ? "+.2%" : "+.4g") : share ? ".2%" : ".4g";
      const trace = {
        type: "heatmap",
        x: Array.from({ length: data.heads }, (_, head) => head),
        y: data.layers,
        z: values,
        ...scale,
        hoverongaps: false,
        colorbar: { thickness: 10, outlinewidth: 0, tickformat: share ? (change ? "+.0%" : ".0%") : "" },
        hovertemplate: `layer %{y}, head %{x}: %{z:${format}}<extra></extra>`,
      };
      const plain = (title) => ({ title: { text: title }, showgrid: false, zeroline: false });
      figures.draw(element, [trace], { hovermode: "closest", xaxis: plain("head"), yaxis: plain("layer") }, narrow);
    }
  };
  byId("metric").addEventListener("change", drawHeads);

  for (const button of document.querySelectorAll("button.more"))
    button.addEventListener("click", () => {
      for (const line of button.closest("section").querySelectorAll(`tr.more[data-run="${button.dataset.run}"]`)) line.hidden = false;
      button.remove();
    });

  // What tokens receive, layer by layer, as a file.
  byId("save-received")?.addEventListener("click", () => {
    const { state } = shared;
    const own = data.texts[state.text];
    const head = [["token", "text", "layer", ...data.runs.map((run) => run.label)].join(",")];
    const quoted = (word) => `"${(/^[=+@-]/.test(word) ? `'${word}` : word).replaceAll('"', '""')}"`;
    const values = data.runs.map((run) => shared.floats(run.texts[state.text].received));
    const n = own.token.length;
    for (let layer = 0; layer <= data.layers.length; layer++)
      for (let index = 0; index < n; index++)
        head.push([index, quoted(own.visible[index]), quoted(shared.layerName(layer)), ...values.map((each) => each[layer * n + index])].join(","));
    figures.saveData("received.csv", head.join("\r\n") + "\r\n", "text/csv");
  });

  if (data.texts.length) {
    text.showText();
    text.shade();
  }
  figures.whenChanged(() => {
    drawDepth();
    drawClasses();
    drawHeads();
  });
  document.documentElement.dataset.ready = "true";
})();
