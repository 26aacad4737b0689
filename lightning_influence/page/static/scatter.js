// A scatter of thousands of points on a canvas, with a box to choose some of them.

import { linear, logarithmic } from './charts.js';
import { h, number } from './dom.js';

const LEFT = 58;
const BOTTOM = 40;
const TOP = 10;
const RIGHT = 14;

/** @typedef {{ x0: number, x1: number, y0: number, y1: number }} Box In the units of the axes. */

/**
 * @typedef {object} Points
 * @property {ArrayLike<number>} x
 * @property {ArrayLike<number>} y
 * @property {(row: number) => boolean} marked
 * @property {string} xName
 * @property {string} yName
 * @property {boolean} [logX]
 * @property {boolean} [logY]
 */

/**
 * @param {Points} points
 * @param {{ label: string, onBox?: (box: Box | null) => void, height?: number, box?: Box | null }} options
 */
export function scatter(points, { label, onBox, height = 420, box = null }) {
  const canvas = /** @type {HTMLCanvasElement} */ (
    /** @type {unknown} */ (
      h('canvas', { role: 'img', 'aria-label': label, class: onBox ? 'scatter boxed' : 'scatter' })
    )
  );
  let [width, drag, before] = [720, /** @type {[number, number] | null} */ (null), box];
  let [x, y] = [scaleOf(points.x, !!points.logX, LEFT, width), scaleOf(points.y, !!points.logY, 0, 1)];

  function draw() {
    width = canvas.clientWidth || 720;
    const ratio = window.devicePixelRatio || 1;
    [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
    const pen = /** @type {CanvasRenderingContext2D} */ (canvas.getContext('2d'));
    pen.scale(ratio, ratio);
    x = scaleOf(points.x, !!points.logX, LEFT, width - RIGHT);
    y = scaleOf(points.y, !!points.logY, height - BOTTOM, TOP);
    const style = getComputedStyle(canvas);
    const colour = (/** @type {string} */ name) => style.getPropertyValue(name).trim();
    pen.font = `11px ${style.fontFamily}`;
    frame(pen, colour('--line'), colour('--muted'));
    const size = points.x.length > 1000 ? 1.2 : 1.8;
    for (const marked of [false, true]) {
      pen.fillStyle = colour(marked ? '--mark' : '--dot');
      pen.globalAlpha = marked ? 0.75 : 0.45;
      for (let row = 0; row < points.x.length; row += 1) {
        if (points.marked(row) !== marked) continue;
        const [a, b] = [x.to(points.x[row]), y.to(points.y[row])];
        if (!Number.isFinite(a) || !Number.isFinite(b)) continue;
        // Candidates differ in form, too.
        const half = marked ? 2.2 : size;
        pen.fillRect(a - half, b - half, 2 * half, 2 * half);
      }
    }
    pen.globalAlpha = 1;
    if (box) outline(pen, colour('--accent'));
  }

  /**
   * @param {CanvasRenderingContext2D} pen
   * @param {string} line
   * @param {string} ink
   */
  function frame(pen, line, ink) {
    Object.assign(pen, { strokeStyle: line, fillStyle: ink, lineWidth: 1, textBaseline: 'middle' });
    for (const value of y.ticks) {
      const at = Math.round(y.to(value)) + 0.5;
      pen.beginPath();
      pen.moveTo(LEFT, at);
      pen.lineTo(width - RIGHT, at);
      pen.stroke();
      pen.textAlign = 'right';
      pen.fillText(number(value), LEFT - 6, at);
    }
    pen.textAlign = 'center';
    for (const value of x.ticks) pen.fillText(number(value), x.to(value), height - BOTTOM + 12);
    pen.fillText(points.xName, (LEFT + width) / 2, height - 9);
    pen.save();
    pen.translate(9, (height - BOTTOM) / 2);
    pen.rotate(-Math.PI / 2);
    pen.fillText(points.yName, 0, 0);
    pen.restore();
  }

  /**
   * @param {CanvasRenderingContext2D} pen
   * @param {string} colour
   */
  function outline(pen, colour) {
    const { x0, x1, y0, y1 } = /** @type {Box} */ (box);
    const [a, b, c, d] = [x.to(x0), y.to(y1), x.to(x1), y.to(y0)];
    Object.assign(pen, { strokeStyle: colour, fillStyle: colour, lineWidth: 1.5, globalAlpha: 0.1 });
    pen.fillRect(a, b, c - a, d - b);
    pen.globalAlpha = 1;
    pen.strokeRect(a, b, c - a, d - b);
  }

  const at = (/** @type {PointerEvent} */ event) => {
    const place = canvas.getBoundingClientRect();
    return /** @type {[number, number]} */ ([event.clientX - place.left, event.clientY - place.top]);
  };
  if (onBox) {
    canvas.addEventListener('pointerdown', (event) => {
      [drag, before] = [at(event), box];
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener('pointermove', (event) => {
      if (!drag) return;
      const here = at(event);
      const [xs, ys] = [0, 1].map((axis) => [drag?.[axis] ?? 0, here[axis]].sort((a, b) => a - b));
      box = { x0: x.from(xs[0]), x1: x.from(xs[1]), y0: y.from(ys[1]), y1: y.from(ys[0]) };
      draw();
    });
    canvas.addEventListener('pointerup', (event) => {
      const here = at(event);
      if (!drag || Math.hypot(here[0] - drag[0], here[1] - drag[1]) < 4) box = null;
      drag = null;
      draw();
      onBox(box);
    });
    // The system took the finger or the mouse: what was chosen before stays so.
    canvas.addEventListener('pointercancel', () => {
      [drag, box] = [null, before];
      draw();
    });
  }
  canvas.style.height = `${height}px`;
  new ResizeObserver(draw).observe(canvas);
  return canvas;
}

/**
 * @param {ArrayLike<number>} values
 * @param {boolean} log
 * @param {number} from
 * @param {number} to
 */
function scaleOf(values, log, from, to) {
  let [low, high] = [Infinity, -Infinity];
  for (let row = 0; row < values.length; row += 1) {
    const value = values[row];
    if (Number.isFinite(value) && (!log || value > 0)) [low, high] = [Math.min(low, value), Math.max(high, value)];
  }
  if (low > high) [low, high] = [log ? 0.1 : 0, 1];
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - 1, high + 1];
  const place = log ? Math.log10 : (/** @type {number} */ value) => value;
  const back = log ? (/** @type {number} */ value) => 10 ** value : (/** @type {number} */ value) => value;
  const margin = 0.02 * (place(high) - place(low));
  [low, high] = [back(place(low) - margin), back(place(high) + margin)];
  const scale = log ? logarithmic(low, high, from, to) : linear(low, high, from, to, 6);
  const span = place(high) - place(low);
  const inverse = (/** @type {number} */ pixel) => back(place(low) + ((pixel - from) / (to - from)) * span);
  return { ...scale, from: inverse };
}
