
// What the parts of the page share: the data, how numbers are written, and what is shown at present.
const shared = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const bytes = (base64) => Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const floats = (base64) => new Float32Array(bytes(base64).buffer);
  const percent = (share) => {
    if (!Number.isFinite(share)) return "–";
    const value = 100 * Math.abs(share);
    const digits = value >= 10 ? value.toFixed(1) : value >= 0.001 || value === 0 ? value.toPrecision(3) : value.toExponential(1);
    return `${share < 0 ? "−" : ""}${digits} %`;
  };
  const signed = (share) => `${share > 0 ? "+" : ""}${percent(share)}`;
  const times = (factor) => `× ${factor >= 100 ? Math.round(factor).toLocaleString("en") : factor.toPrecision(3)}`;
  const layerName = (index) => (index === 0 ? "all layers" : `layer ${data.layers[index - 1]}`);
  // Layer 0 is the mean of all. `query` is the token whose attention is shown, -1 where it is what tokens receive.
  const state = { text: 0, run: 0, layer: 0, head: -1, current: -1, change: false, query: -1 };
  // Single heads are there of some layers only: where they are not, the mean of the heads is shown.
  const layerPlace = () => (state.layer === 0 ? 0 : 1 + data.detail.layers.indexOf(state.layer - 1));
  const head = () => (state.head < 0 || layerPlace() === 0 && state.layer > 0 ? -1 : state.head);
  const where = () => layerName(state.layer) + (head() < 0 ? ", all heads" : `, head ${head()}`);
  const median = (values) => {
    const sorted = Float32Array.from(values).sort();
    return sorted[sorted.length >> 1];
  };
  return { data, byId, bytes, floats, percent, signed, times, layerName, layerPlace, state, head, where, median, many: data.runs.length > 1 };
})();
