// Draws the figures, and prices them again when the form changes. A trace says by its meta what it holds: which axis is
// dollars ("usd") or tokens per second ("rate"), of which GPU, and kept tokens of how many drafts (keptOf); a cell by
// data-usd, data-rate and data-price.
const narrow = window.innerWidth <= 640;
for (const [id, figure] of Object.entries(figures)) {
  if (narrow) {
    figure.layout.margin = {l: 52, r: 8, t: 8, b: 48};
    figure.layout.legend = {orientation: "h", y: -0.14, font: {size: 10}};
    if (figure.layout.yaxis.narrow) { figure.layout.margin.l = 110; figure.layout.yaxis.tickfont = {size: 9}; }
  }
  Plotly.newPlot(id, figure.data, structuredClone(figure.layout), {responsive: true, displaylogo: false});
}

const form = document.getElementById("reprice");
if (form) {
  const priceInputs = [...form.querySelectorAll("[data-price-of]")];
  const book = Object.fromEntries(priceInputs.map(input => [input.dataset.priceOf, Number(input.defaultValue)]));
  const utilisation = form.querySelector("[data-utilisation]");
  const keptInputs = [...form.querySelectorAll("[data-kept]")];

  const best = (traces, meta) => {  // the points that no other beats, fastest user first
    const points = traces.flatMap(trace => trace.x.map((x, i) => [x, trace.y[i]]));
    const lower = meta.best === "low";
    points.sort((a, b) => b[0] - a[0] || (lower ? a[1] - b[1] : b[1] - a[1]));
    const found = [];
    for (const point of points) {
      const last = found[found.length - 1];
      if (!last || (lower ? point[1] < last[1] : point[1] > last[1])) found.push(point);
    }
    return found.reverse();
  };

  const reprice = () => {
    const message = document.getElementById("reprice-error");
    const wrong = [...form.elements].find(input => input.willValidate && (input.value === "" || !input.checkValidity()));
    message.textContent = wrong ? `expected ${wrong.min} or more${wrong.max ? ` and at most ${wrong.max}` : ""}: nothing is priced again` : "";
    if (wrong) return;
    const kept = Object.fromEntries(keptInputs.map(input => [input.dataset.kept, Number(input.value) / Number(input.defaultValue)]));
    const rates = keptOf => kept[keptOf || ""] || 1;
    const price = Object.fromEntries(priceInputs.map(input => [input.dataset.priceOf, Number(input.value)]));
    const dollars = (gpu, keptOf) => price[gpu] / book[gpu] / Number(utilisation.value) / rates(keptOf);
    const factor = (kind, gpu, keptOf) => kind === "usd" ? dollars(gpu, keptOf) : kind === "rate" ? rates(keptOf) : 1;
    utilisation.nextElementSibling.value = `${Math.round(100 * utilisation.value)} %`;
    for (const input of keptInputs) input.nextElementSibling.value = Number(input.value).toFixed(2);
    for (const [id, figure] of Object.entries(figures)) {
      const traces = figure.data.map(trace => {
        const meta = trace.meta || {};
        const gpu = i => meta.gpus ? meta.gpus[i] : meta.gpu;
        const scaled = axis => meta[axis] ? trace[axis].map((value, i) => value * factor(meta[axis], gpu(i), meta.keptOf)) : trace[axis];
        return {...trace, x: scaled("x"), y: scaled("y")};
      });
      const layout = structuredClone(figure.layout);
      const totals = [];
      traces.forEach((trace, number) => {
        const meta = trace.meta || {};
        if (meta.best) [trace.x, trace.y] = [0, 1].map(i => best(traces.filter((_, n) => n !== number), meta).map(p => p[i]));
        if (meta.labels) trace.x.forEach((value, i) => { totals[i] = (totals[i] || 0) + value; });
      });
      if (totals.length) {
        const sorted = [...totals].sort((a, b) => a - b), half = Math.floor(sorted.length / 2);
        const median = sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
        layout.xaxis.range = [0, 1.02 * Math.min(sorted[sorted.length - 1], 4 * median)];
        for (const trace of traces) {
          if (trace.meta && trace.meta.labels) trace.y = trace.meta.labels.map((label, i) => `${label}  \u0024${Number(totals[i].toPrecision(3))}`);
        }
      }
      Plotly.react(id, traces, layout);
    }
    for (const cell of document.querySelectorAll("[data-usd]")) cell.textContent = (cell.dataset.usd * dollars(cell.dataset.gpu, cell.dataset.keptOf)).toFixed(3);
    for (const cell of document.querySelectorAll("[data-rate]")) cell.textContent = (cell.dataset.rate * rates(cell.dataset.keptOf)).toFixed(1);
    for (const cell of document.querySelectorAll("[data-price]")) cell.textContent = price[cell.dataset.price].toFixed(2);
  };
  form.addEventListener("input", reprice);
  form.addEventListener("reset", () => setTimeout(reprice));
  form.addEventListener("submit", event => event.preventDefault());
}
