// Charts in SVG: histogram, curves over epochs, sparkline. Colours come from the style sheet.

import { number, s } from './dom.js';

const LEFT = 48;
const BOTTOM = 22;
const TOP = 10;
const RIGHT = 14;

/** @typedef {{ to: (value: number) => number, ticks: number[] }} Scale */

/**
 * Round numbers between two.
 * @param {number} low
 * @param {number} high
 * @param {number} [count] About how many.
 */
export function ticks(low, high, count = 5) {
  // Of numbers as large as 1e20, steps have to be large as well: the next number is far away.
  const span = Math.max(high - low, 1e-9 * Math.max(Math.abs(low), Math.abs(high))) || 1;
  const raw = span / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * ([1, 2, 5, 10].find((each) => each * power >= raw) ?? 10);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * span; k += 1) {
    found.push(Number((k * step).toPrecision(12)));
  }
  return found;
}

/**
 * @param {number} low
 * @param {number} high
 * @param {number} from Pixels.
 * @param {number} to
 * @param {number} [count]
 * @returns {Scale}
 */
export function linear(low, high, from, to, count = 5) {
  const span = high - low || 1;
  return { to: (value) => from + ((value - low) / span) * (to - from), ticks: ticks(low, high, count) };
}

/**
 * @param {number} low Above 0.
 * @param {number} high
 * @param {number} from
 * @param {number} to
 * @returns {Scale}
 */
export function logarithmic(low, high, from, to) {
  const inner = linear(Math.log10(low), Math.log10(high), from, to);
  const [first, last] = [Math.ceil(Math.log10(low) - 1e-9), Math.floor(Math.log10(high) + 1e-9)];
  const step = Math.max(1, Math.ceil((last - first) / 6));
  // Of few powers of ten, or none, their multiples as well.
  const [start, parts] = last - first < 2 ? [first - 1, [1, 2, 5]] : [first, [1]];
  const found = [];
  for (let k = start; k <= last; k += step) found.push(...parts.map((part) => part * 10 ** k));
  const inside = found.filter((value) => value >= low * (1 - 1e-9) && value <= high * (1 + 1e-9));
  return { to: (value) => inner.to(Math.log10(value)), ticks: inside.length > 1 ? inside : ticks(low, high, 3) };
}

/**
 * Axes with their ticks.
 * @param {Scale} x
 * @param {Scale} y
 * @param {number} width
 * @param {number} height
 * @param {(value: number) => string} [format] Of the ticks below.
 */
function axes(x, y, width, height, format = number) {
  const base = height - BOTTOM;
  return [
    ...y.ticks.map((value) =>
      s(
        'g',
        { class: 'tick', transform: `translate(0,${y.to(value).toFixed(1)})` },
        s('line', { x1: LEFT, x2: width - RIGHT }),
        s('text', { x: LEFT - 6, dy: '0.32em', 'text-anchor': 'end' }, number(value)),
      ),
    ),
    s('line', { class: 'axis', x1: LEFT, x2: width - RIGHT, y1: base, y2: base }),
    ...x.ticks.map((value) =>
      s('text', { class: 'tick', x: x.to(value).toFixed(1), y: base + 15, 'text-anchor': 'middle' }, format(value)),
    ),
  ];
}

/**
 * Count values into bins.
 * @param {ArrayLike<number>} values
 * @param {(row: number) => boolean} inside Which rows count.
 * @param {(row: number) => boolean} marked
 * @param {boolean} log Whether bins are even in the logarithm; values that are not positive are left out.
 * @param {number} [bins]
 */
export function binned(values, inside, marked, log, bins = 48) {
  const usable = (/** @type {number} */ value) => Number.isFinite(value) && (!log || value > 0);
  let [low, high] = [Infinity, -Infinity];
  let left = 0;
  for (let row = 0; row < values.length; row += 1) {
    if (!usable(values[row])) left += inside(row) ? 1 : 0;
    else [low, high] = [Math.min(low, values[row]), Math.max(high, values[row])];
  }
  if (low > high) return { edges: [], counts: [], candidates: [], left };
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - 0.5, high + 0.5];
  const place = log ? Math.log10 : (/** @type {number} */ value) => value;
  const [from, to] = [place(low), place(high)];
  const edges = Array.from({ length: bins + 1 }, (_, k) => {
    const edge = from + ((to - from) * k) / bins;
    return log ? 10 ** edge : edge;
  });
  const [counts, candidates] = [new Array(bins).fill(0), new Array(bins).fill(0)];
  for (let row = 0; row < values.length; row += 1) {
    if (!usable(values[row]) || !inside(row)) continue;
    const bin = Math.min(bins - 1, Math.floor(((place(values[row]) - from) / (to - from)) * bins));
    counts[bin] += 1;
    if (marked(row)) candidates[bin] += 1;
  }
  return { edges, counts, candidates, left };
}

/**
 * A histogram with candidates marked in it.
 * @param {{ edges: number[], counts: number[], candidates?: number[] }} bins
 * @param {{ label: string, logX?: boolean, logY?: boolean, mark?: number, width: number, height?: number,
 *   highest?: number }} options `mark`: a value to point at.
 */
export function histogram({ edges, counts, candidates = [] }, options) {
  const { label, logX = false, logY = false, mark, width, height = 250, highest } = options;
  const most = Math.max(1, highest ?? Math.max(...counts));
  const base = height - BOTTOM;
  const [low, high] = [edges[0], edges[edges.length - 1]];
  const x = logX
    ? logarithmic(low, high, LEFT, width - RIGHT)
    : linear(low, high, LEFT, width - RIGHT, Math.max(2, width / 90));
  const y = logY ? logarithmic(0.5, most * 1.2, base, TOP) : linear(0, most, base, TOP, 4);
  y.ticks = y.ticks.filter(Number.isInteger);
  const top = (/** @type {number} */ count) => (count > 0 ? y.to(count) : base);
  const bars = counts.flatMap((count, k) => {
    const [from, to] = [x.to(edges[k]), x.to(edges[k + 1])];
    const size = { x: (from + 0.5).toFixed(1), width: Math.max(0.8, to - from - 1).toFixed(1) };
    const both = [
      bar('bar', count, size, top(count), base),
      bar('bar marked', candidates[k] ?? 0, size, top(candidates[k]), base),
    ];
    const told = `${number(edges[k])} to ${number(edges[k + 1])}: ${count} examples, ${candidates[k] ?? 0} candidates`;
    return count ? [s('g', {}, s('title', {}, told), both)] : [];
  });
  const pointer =
    mark !== undefined && Number.isFinite(mark) && mark >= low && mark <= high
      ? [s('line', { class: 'pointer', x1: x.to(mark), x2: x.to(mark), y1: TOP, y2: base })]
      : [];
  return s(
    'svg',
    { class: 'chart', width, height, role: 'img', 'aria-label': label },
    axes(x, y, width, height),
    bars,
    pointer,
  );
}

/**
 * @param {string} kind
 * @param {number} count
 * @param {Record<string, string>} size
 * @param {number} top
 * @param {number} base
 */
function bar(kind, count, size, top, base) {
  return (
    count > 0 && s('rect', { class: kind, ...size, y: top.toFixed(1), height: Math.max(0, base - top).toFixed(1) })
  );
}

/**
 * Curves over epochs, the second one in another colour and form.
 * @param {number[]} epochs
 * @param {ArrayLike<number>[]} series
 * @param {{ label: string, width: number, height?: number, low?: number, high?: number }} options
 */
export function curve(epochs, series, { label, width, height = 150, low, high }) {
  const known = series.flatMap((values) => Array.from(values).filter((value) => Number.isFinite(value)));
  const least = low ?? Math.min(0, ...known);
  const most = high ?? Math.max(0, ...known);
  const [first, last] = [epochs[0], epochs[epochs.length - 1]];
  const x = linear(first, Math.max(last, first + 1), LEFT, width - RIGHT, Math.max(2, width / 60));
  x.ticks = x.ticks.filter((value) => Number.isInteger(value));
  const y = linear(least, least === most ? most + 1 : most, height - BOTTOM, TOP, 4);
  const drawn = series.map((values, which) => {
    const kind = which ? ' other' : '';
    const dots = epochs.map((epoch, k) => {
      const place = { class: `dot${kind}`, cx: x.to(epoch).toFixed(1), cy: y.to(values[k]).toFixed(1), r: 2.6 };
      return Number.isFinite(values[k]) && s('circle', place, s('title', {}, `epoch ${epoch}: ${number(values[k])}`));
    });
    return [s('path', { class: `curve${kind}`, d: path(epochs, values, x, y) }), epochs.length <= 40 && dots];
  });
  const size = { class: 'chart', width, height, role: 'img', 'aria-label': label };
  return s('svg', size, axes(x, y, width, height, String), drawn);
}

/**
 * @param {ArrayLike<number>} at
 * @param {ArrayLike<number>} values
 * @param {Scale} x
 * @param {Scale} y
 */
function path(at, values, x, y) {
  let [text, pen] = ['', 'M'];
  for (let k = 0; k < values.length; k += 1) {
    if (Number.isFinite(values[k])) {
      text += `${pen}${x.to(at[k]).toFixed(1)},${y.to(values[k]).toFixed(1)}`;
      pen = 'L';
    } else pen = 'M';
  }
  return text;
}

/**
 * A curve without axes.
 * @param {ArrayLike<number> | null} values
 * @param {number} most The value at the top.
 * @param {number} [width]
 * @param {number} [height]
 */
export function sparkline(values, most, width = 84, height = 26) {
  const size = { class: 'sparkline', width, height, viewBox: `0 0 ${width} ${height}`, 'aria-hidden': 'true' };
  if (!values?.length) return s('svg', size);
  const x = linear(0, Math.max(1, values.length - 1), 2, width - 3);
  const y = linear(0, most, height - 2, 3);
  const places = Array.from(values, (_, k) => k);
  const capped = Array.from(values, (value) => Math.min(value, most));
  const last = capped.length - 1;
  const end = Number.isFinite(capped[last]) && s('circle', { cx: x.to(last), cy: y.to(capped[last]), r: 2 });
  const ground = s('line', { class: 'ground', x1: 0, x2: width, y1: height - 1.5, y2: height - 1.5 });
  return s('svg', size, ground, s('path', { d: path(places, capped, x, y) }), end);
}
