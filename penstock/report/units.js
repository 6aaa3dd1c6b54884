// Numbers as people read them, and the round numbers that axes show.

const TIMES = [[1e9, "s"], [1e6, "ms"], [1e3, "µs"], [1, "ns"]];
const SIZES = [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"], [1, "B"]];
const RATES = [[1e12, "TB/s"], [1e9, "GB/s"], [1e6, "MB/s"], [1e3, "kB/s"], [1, "B/s"]];

/** Three significant digits, or all digits before the point. */
function digits(value) {
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  if (size >= 100 || size === 0) return value.toFixed(0);
  return String(Number(value.toPrecision(3)));
}

function scaled(value, units) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  const [unit, name] = units.find(([least]) => size >= least * 0.9995) ?? units[units.length - 1];
  return `${digits(value / unit).replace("-", "−")} ${name}`;
}

/** Nanoseconds as text; minutes and hours above two minutes. */
function formatTime(ns) {
  if (Number.isFinite(ns) && Math.abs(ns) >= 120e9) {
    const seconds = Math.round(Math.abs(ns) / 1e9);
    const sign = ns < 0 ? "−" : "";
    const hours = Math.floor(seconds / 3600);
    const rest = `${Math.floor((seconds % 3600) / 60)} min ${seconds % 60} s`;
    return sign + (hours ? `${hours} h ${Math.floor((seconds % 3600) / 60)} min` : rest);
  }
  return scaled(ns, TIMES);
}

/** An instant of the run: never coarser than a millisecond. */
function formatInstant(ns) {
  if (Math.abs(ns) < 1e9) return formatTime(ns);
  return `${(ns / 1e9).toLocaleString("en-US", { minimumFractionDigits: 3, maximumFractionDigits: 3 })} s`;
}

const formatBytes = (nbytes) => scaled(nbytes, SIZES);
const formatRate = (rate) => scaled(rate, RATES);
const formatCount = (count) => (count === null || count === undefined ? "–" : Math.round(count).toLocaleString("en-US"));

function formatShare(share) {
  if (share === null || share === undefined) return "–";
  const percent = share * 100;
  if (percent > 0 && percent < 0.05) return "< 0.1 %";
  const fine = (percent > 0 && percent < 9.95) || (percent > 99.05 && percent < 99.95);
  return `${percent.toFixed(fine ? 1 : 0)} %`;
}

const plural = (count, one, many = `${one}s`) => `${formatCount(count)} ${count === 1 ? one : many}`;

/** Least of 1, 2, 5 times a power of ten that cuts `extent` into at most `most` pieces. */
function niceStep(extent, most) {
  const rough = Math.max(extent, Number.MIN_VALUE) / Math.max(1, most);
  const power = 10 ** Math.floor(Math.log10(rough));
  return power * ([1, 2, 5, 10].find((times) => times * power >= rough * 0.9999) ?? 10);
}

const MINUTE = 60e9;
const LONG_STEPS = [1, 2, 5, 10, 20, 30, 60, 120, 240, 480, 1440].map((minutes) => minutes * MINUTE);

/** A step of time: as above, but whole minutes and hours once seconds are too many. */
function niceTimeStep(extent, most) {
  if (extent / most < MINUTE / 2) return niceStep(extent, most);
  return LONG_STEPS.find((step) => step * most >= extent) ?? niceStep(extent, most);
}

/** The same for bytes: 1, 2, 4, 8 … times a power of 1024, so that labels are round in binary units. */
const niceByteStep = (extent, most) => 2 ** Math.ceil(Math.log2(Math.max(1, extent / Math.max(1, most))) - 1e-6);

/** Multiples of `step` in [low, high]. */
function ticksBetween(low, high, step) {
  const found = [];
  for (let i = Math.ceil(low / step - 1e-6); i * step <= high + step * 1e-6; i += 1) found.push(i * step || 0); // −0 is 0
  return found;
}

/** A function that labels multiples of `step` with as many digits as tell neighbours apart, in one unit. */
function tickLabels(step, extent, units) {
  const [unit, name] = units.find(([least]) => extent >= least) ?? units[units.length - 1];
  const places = Math.max(0, Math.min(9, Math.ceil(-Math.log10(step / unit) - 1e-9)));
  if (units === TIMES && step >= MINUTE) {
    return (ns) => {
      const minutes = Math.round(ns / MINUTE);
      return minutes >= 60 ? `${Math.floor(minutes / 60)} h ${minutes % 60 ? `${minutes % 60} min` : ""}`.trim() : minutes ? `${minutes} min` : "0";
    };
  }
  const binary = units === SIZES;
  return (value) => {
    const number = value / unit;
    const text = binary ? String(Number(number.toFixed(3))) : number.toFixed(places);
    return value === 0 ? "0" : `${text.replace("-", "−")} ${name}`;
  };
}
