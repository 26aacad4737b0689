// Elements and numbers. Text only ever becomes text nodes: labels and texts of a data set are untrusted.

const SVG = 'http://www.w3.org/2000/svg';

/** @typedef {Node | string | number | null | undefined | false} Child */
/** @typedef {Child | readonly any[]} Children Nested; what is nothing, or false, is left out. */
/** @typedef {Record<string, any>} Attributes */

/**
 * Make an element of HTML.
 * @param {string} tag
 * @param {Attributes} [attributes] `class`, `on` (event to listener), `style` (property to value), or attributes.
 * @param {...Children} children
 * @returns {HTMLElement & Record<string, any>}
 */
export function h(tag, attributes = {}, ...children) {
  return /** @type {any} */ (filled(document.createElement(tag), attributes, children));
}

/**
 * Make an element of SVG.
 * @param {string} tag
 * @param {Attributes} [attributes]
 * @param {...Children} children
 * @returns {SVGElement}
 */
export function s(tag, attributes = {}, ...children) {
  return /** @type {any} */ (filled(document.createElementNS(SVG, tag), attributes, children));
}

/**
 * @param {Element} element
 * @param {Attributes} attributes
 * @param {Children[]} children
 */
function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === 'on') {
      for (const [type, listener] of Object.entries(value)) element.addEventListener(type, listener);
    } else if (name === 'style') {
      for (const [property, text] of Object.entries(value)) {
        /** @type {HTMLElement} */ (element).style.setProperty(property, String(text));
      }
    } else {
      element.setAttribute(name, value === true ? '' : String(value));
    }
  }
  element.append(...nodes(children));
  return element;
}

/**
 * Put other children into an element. A select box in which somebody is stays, if it is among them again: another one
 * would know nothing of the letters that were typed.
 * @param {Element} element
 * @param {...Children} children
 */
export function fill(element, ...children) {
  const fresh = nodes(children);
  const box = /** @type {HTMLSelectElement | null} */ (element.querySelector('select:focus'));
  const old = [...element.children].find((each) => box && each.contains(box));
  const place = old ? fresh.findIndex((each) => each instanceof Element && each.textContent === old.textContent) : -1;
  const twin = place < 0 ? null : /** @type {Element} */ (fresh[place]).querySelector('select');
  if (!box || !old || !twin) {
    element.replaceChildren(...fresh);
    return;
  }
  box.value = twin.value;
  for (const each of [...element.childNodes]) if (each !== old) each.remove();
  old.before(...fresh.slice(0, place));
  old.after(...fresh.slice(place + 1));
}

/**
 * @param {Children[]} children
 * @returns {Node[]}
 */
function nodes(children) {
  return children.flatMap((child) => {
    if (Array.isArray(child)) return nodes(child);
    if (child === null || child === undefined || child === false) return [];
    return [child instanceof Node ? child : document.createTextNode(String(child))];
  });
}

/**
 * Draw anew, with the same control in focus, by what it is called: else whoever works by keys starts from the top.
 * @param {Element} element
 * @param {() => void} draw
 */
export function refocused(element, draw) {
  const focused = document.activeElement;
  const nameOf = (/** @type {Element} */ each) =>
    each.getAttribute('aria-label') ?? (each.closest('label') ?? each).textContent;
  const name = focused && nameOf(focused);
  const same = () => [...element.querySelectorAll(focused?.tagName ?? '')].filter((each) => nameOf(each) === name);
  const place = focused && element.contains(focused) && focused !== element ? same().indexOf(focused) : -1;
  draw();
  if (place >= 0) /** @type {HTMLElement | undefined} */ (same()[place])?.focus({ preventScroll: true });
}

/**
 * A button.
 * @param {string} text
 * @param {(event: MouseEvent) => void} act
 * @param {Attributes} [attributes]
 * @param {string} [key] The key that does the same.
 */
export function button(text, act, attributes = {}, key = '') {
  const cap = key && h('kbd', { 'aria-hidden': 'true' }, key);
  const shortcut = key ? { 'aria-keyshortcuts': key } : {};
  return h('button', { type: 'button', on: { click: act }, ...shortcut, ...attributes }, h('span', {}, text), cap);
}

/**
 * A labelled select box.
 * @param {string} label
 * @param {[string, string][]} options Values and what is shown.
 * @param {string} value
 * @param {(value: string) => void} act
 * @param {boolean} [hidden] Whether the label is for screen readers alone.
 */
export function select(label, options, value, act, hidden = false) {
  const entries = options.map(([key, text]) => h('option', { value: key, selected: key === value }, text));
  const box = h('select', { 'aria-label': label, on: { change: () => act(box.value) } }, entries);
  return h('label', { class: 'field' }, !hidden && h('span', {}, label), box);
}

/**
 * A labelled check box.
 * @param {string} label
 * @param {boolean} value
 * @param {(value: boolean) => void} act
 */
export function check(label, value, act) {
  const box = h('input', { type: 'checkbox', checked: value, on: { change: () => act(box.checked) } });
  return h('label', { class: 'field check' }, box, h('span', {}, label));
}

/**
 * A drawing that is as wide as there is room, and drawn anew when that changes.
 * @param {number} height In pixels, so that nothing jumps.
 * @param {(width: number) => Node} draw
 */
export function fitted(height, draw) {
  const box = h('div', { class: 'fitted', style: { 'min-height': `${height}px` } });
  let width = 0;
  const observer = new ResizeObserver((entries) => {
    const room = Math.round(entries[0].contentRect.width);
    if (room && room !== width) box.replaceChildren(draw((width = room)));
  });
  observer.observe(box);
  return box;
}

/**
 * A number as a person reads it.
 * @param {number} value
 */
export function number(value) {
  if (!Number.isFinite(value)) return '–';
  const size = Math.abs(value);
  return `${value < 0 ? '−' : ''}${positive(size)}`;
}

/** @param {number} size */
function positive(size) {
  if (Number.isInteger(size) && size < 1e6) return size.toLocaleString('en');
  if (size >= 1e5 || (size < 1e-3 && size > 0)) return size.toExponential(2).replace('e+', 'e').replace('e-', 'e−');
  return size >= 1000 ? Math.round(size).toLocaleString('en') : String(Number(size.toPrecision(3)));
}

/**
 * A share in per cent.
 * @param {number} value From 0 to 1.
 */
export function percent(value) {
  if (!Number.isFinite(value)) return '–';
  if (value > 0.999 && value < 1) return '> 99.9%';
  if (value < 0.001 && value > 0) return '< 0.1%';
  return `${(100 * value).toFixed(value > 0.99 || value < 0.1 ? 1 : 0)}%`;
}

/**
 * A count with its noun.
 * @param {number} count
 * @param {string} noun
 */
export function counted(count, noun) {
  return `${count.toLocaleString('en')} ${noun}${count === 1 ? '' : 's'}`;
}

/**
 * Offer a file to be saved.
 * @param {string} name
 * @param {string} text
 */
export function download(name, text) {
  const address = URL.createObjectURL(new Blob([text], { type: 'text/csv' }));
  h('a', { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}
