
// Rows of single queries: from the file, or from the program that serves the page.
const rows = (() => {
  const { data, state, bytes, head, layerPlace } = shared;
  const { largest, layers, heads } = data.detail;
  const perRow = 2 * (1 + largest);
  const perQuery = perRow * (1 + heads.length) * (1 + layers.length);
  const OUTLIER = 1 << 15;

  const half = (code) => {
    const sign = code & 0x8000 ? -1 : 1;
    const exponent = (code >> 10) & 0x1f;
    const fraction = code & 0x3ff;
    return sign * (exponent === 0 ? fraction * 2 ** -24 : (1 + fraction / 1024) * 2 ** (exponent - 15));
  };
  const numbers = (base64) => new Uint16Array(bytes(base64).buffer);

  // For each text what is known of its queries: one array of numbers for each run.
  const known = data.texts.map((text) => {
    const found = new Map();
    if (text.rows) {
      const runs = text.rows.runs.map(numbers);
      text.rows.queries.forEach((query, place) => {
        found.set(query, runs.map((run) => run.subarray(place * perQuery, (place + 1) * perQuery)));
      });
    }
    return found;
  });
  const has = (query) => known[state.text].has(query);
  const queries = () => [...known[state.text].keys()];

  let asked = 0;
  // Calls `done` with whether the row is there: at once where it is known.
  const need = async (query, done) => {
    const text = state.text;
    const mine = (asked += 1);
    if (!has(query) && data.detail.served) {
      try {
        const answer = await fetch(`row?text=${text}&query=${query}`);
        if (!answer.ok) throw new Error(await answer.text());
        known[text].set(query, (await answer.json()).runs.map(numbers));
      } catch {
        if (mine === asked) done(false);
        return;
      }
    }
    if (mine === asked) done(has(query));
  };

  // One head's row, or the mean's: how many outliers, the sum of the row, and its largest weights.
  const row = (query, run, layer, ownHead) => {
    const packed = known[state.text].get(query)[run];
    const slot = ownHead < 0 ? 0 : 1 + heads.indexOf(ownHead);
    const at = (layer * (1 + heads.length) + slot) * perRow;
    const entries = [];
    for (let place = at + 2; place < at + perRow; place += 2) {
      const weight = half(packed[place + 1]);
      if (weight > 0) entries.push({ key: packed[place] & (OUTLIER - 1), outlier: (packed[place] & OUTLIER) > 0, weight });
    }
    return { outliers: packed[at], total: half(packed[at + 1]), entries };
  };
  const now = (run) => row(state.query, run, layerPlace(), head());
  // Whether the layer at hand is among those whose rows are kept; the mean of all is.
  const covered = () => state.layer === 0 || layerPlace() > 0;
  return { has, queries, need, row, now, covered };
})();
