
// One query: where a token looks, in the head at hand and in all of them.
(() => {
  const { data, byId, percent, signed, state, head, where, layerName, many } = shared;
  const panel = byId("query");
  if (!panel) return;
  const last = data.runs.length - 1;

  const cell = (line, value, kind) => {
    const part = document.createElement("td");
    part.textContent = value;
    if (kind) part.className = kind;
    line.append(part);
  };

  // The keys with the largest weights in any run, the largest first.
  const showKeys = () => {
    const found = data.runs.map((_, run) => rows.now(run));
    const weights = found.map((row) => new Map(row.entries.map((each) => [each.key, each.weight])));
    const outliers = new Set(found.flatMap((row) => row.entries.filter((each) => each.outlier).map((each) => each.key)));
    const largest = (key) => Math.max(...weights.map((each) => each.get(key) ?? 0));
    const keys = [...new Set(weights.flatMap((each) => [...each.keys()]))].sort((one, other) => largest(other) - largest(one));
    const body = byId("query-keys");
    body.replaceChildren();
    for (const key of keys) {
      const line = document.createElement("tr");
      const name = document.createElement("td");
      const code = document.createElement("code");
      code.textContent = text.named(key);
      code.classList.toggle("outlier", outliers.has(key));
      name.append(code, key === state.query ? " itself" : "");
      line.append(name);
      cell(line, key.toLocaleString("en"), "number");
      for (const each of weights) cell(line, each.has(key) ? percent(each.get(key)) : "less", "number");
      const [before, after] = [weights[0].get(key), weights[last].get(key)];
      if (many) cell(line, before === undefined || after === undefined ? "" : signed(after - before), "number");
      body.append(line);
    }
    const rest = document.createElement("tr");
    cell(rest, "all others");
    cell(rest, "", "number");
    const others = found.map((row) => Math.max(0, row.total - row.entries.reduce((sum, each) => sum + each.weight, 0)));
    // Sums are in half precision, so that less than a tenth of a per cent is not known of the rest.
    for (const each of others) cell(rest, each < 0.001 ? "< 0.1 %" : `${(100 * each).toFixed(1)} %`, "number");
    if (many) cell(rest, "", "number");
    body.append(rest);
    const count = found[0].outliers;
    byId("query-what").textContent = `${where()}: ${count === 0 ? "no outlier" : count === 1 ? "1 outlier" : `${count} outliers`} of this token in the source layer${head() < 0 ? ", in any head" : ""}.`;
  };

  // The largest weight of each head, and on which token.
  const drawHeads = () => {
    const { layers, heads } = data.detail;
    const values = [];
    const told = [];
    layers.forEach((_, at) => {
      values.push([]);
      told.push([]);
      for (const one of heads) {
        const [before, now] = [rows.row(state.query, 0, 1 + at, one), rows.row(state.query, state.run, 1 + at, one)];
        const top = now.entries[0];
        if (!top) {
          values[at].push(null);
          told[at].push("");
          continue;
        }
        const was = before.entries.find((each) => each.key === top.key);
        const change = was ? top.weight - was.weight : null;
        values[at].push(state.change ? change : top.weight);
        const also = many && change !== null ? `, ${signed(change)} against ${data.runs[0].label}` : "";
        told[at].push(`most on “${text.named(top.key)}” (${top.key}): ${percent(top.weight)}${also}`);
      }
    });
    const flat = values.flat().filter((each) => each !== null);
    const most = Math.max(1e-6, ...flat.map(Math.abs));
    const scale = state.change ? { colorscale: figures.change(), zmin: -most, zmax: most } : { ...figures.level(), zmin: 0, zmax: 1 };
    const trace = {
      type: "heatmap",
      x: heads.map(String),
      y: layers.map((place) => String(data.layers[place])),
      z: values,
      text: told,
      ...scale,
      colorbar: { thickness: 10, outlinewidth: 0, tickformat: state.change ? "+.0%" : ".0%" },
      hovertemplate: "layer %{y}, head %{x}: %{text}<extra></extra>",
      hoverongaps: false,
    };
    const category = (title) => ({ type: "category", title: { text: title }, showgrid: false });
    const element = byId("query-heads");
    figures.draw(element, [trace], { hovermode: "closest", xaxis: category("head"), yaxis: category("layer") });
    if (element.dataset.listens) return;
    element.dataset.listens = "true";
    element.on("plotly_click", (event) => {
      const [y, x] = event.points[0].pointIndex;
      text.go(1 + data.detail.layers[y], data.detail.heads[x]);
    });
  };

  let drawn = "";
  let waiting = false;
  const drawSoon = () => {
    // What the picture shows hangs on these alone; it is drawn after the text, which answers first.
    const wanted = `${state.text} ${state.query} ${state.run} ${state.change}`;
    if (wanted === drawn || waiting) return;
    waiting = true;
    requestAnimationFrame(() =>
      setTimeout(() => {
        waiting = false;
        if (state.query < 0 || !rows.has(state.query)) return;
        drawn = `${state.text} ${state.query} ${state.run} ${state.change}`;
        drawHeads();
      }, 0),
    );
  };

  const show = () => {
    panel.hidden = state.query < 0;
    byId("query-hint").hidden = state.query >= 0;
    if (state.query < 0) return;
    byId("query-name").textContent = text.named(state.query);
    byId("query-place").textContent = `token ${state.query.toLocaleString("en")} of ${data.texts[state.text].token.length.toLocaleString("en")}`;
    const there = rows.has(state.query) && rows.covered();
    byId("query-there").hidden = !there;
    byId("query-missing").hidden = there;
    if (there) {
      showKeys();
      drawSoon();
    } else if (rows.has(state.query)) {
      byId("query-missing").textContent = `The heads of ${layerName(state.layer)} are not in this page: make it with --layers.`;
    } else byId("query-missing").textContent = byId("query-missing").dataset.words;
  };
  text.whenShaded(show);
  byId("query-back").addEventListener("click", () => text.ask(-1));
  figures.whenChanged(() => {
    drawn = "";
    if (state.query >= 0 && rows.has(state.query)) drawSoon();
  });
})();
