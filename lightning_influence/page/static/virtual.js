// A list of any length of which only what can be seen is drawn.

import { h } from './dom.js';

const AHEAD = 8; // rows above and below
const HIGHEST = 8e6; // pixels; browsers cap what is higher than some 17 to 33 million

export class VirtualList {
  /**
   * @param {object} options
   * @param {string} options.label For screen readers.
   * @param {number} options.height Of a row, in pixels.
   * @param {number} options.least Width of an item at least; Infinity for one a row.
   * @param {(place: number) => HTMLElement} options.draw
   * @param {(place: number) => void} options.onPick
   * @param {(place: number) => void} options.onOpen
   */
  constructor(options) {
    this.options = options;
    this.count = 0;
    this.chosen = -1;
    this.across = 1;
    this.offset = 0; // of a list that is higher than its element can be: where it begins, above that
    this.seen = 0; // where it was scrolled to last
    /** @type {Map<number, HTMLElement>} */
    this.drawn = new Map();
    this.space = h('div', { class: 'space', role: 'presentation' });
    this.element = h(
      'div',
      {
        class: 'scroller',
        role: 'listbox',
        tabindex: '0',
        'aria-label': options.label,
        on: {
          scroll: () => this.scrolled(),
          click: (/** @type {MouseEvent} */ event) => this.picked(event, options.onPick),
          dblclick: (/** @type {MouseEvent} */ event) => this.picked(event, options.onOpen),
        },
      },
      this.space,
    );
    this.observer = new ResizeObserver(() => this.layout());
    this.observer.observe(this.element);
  }

  /**
   * @param {MouseEvent} event
   * @param {(place: number) => void} act
   */
  picked(event, act) {
    const item = /** @type {Element} */ (event.target).closest('[data-place]');
    if (item) act(Number(/** @type {HTMLElement} */ (item).dataset.place));
  }

  /**
   * Show another list.
   * @param {number} count
   */
  reset(count) {
    this.count = count;
    this.layout();
  }

  layout() {
    const width = this.element.clientWidth;
    if (!width) return;
    const top = this.top;
    this.across = Math.max(1, Math.floor(width / this.options.least));
    this.space.style.height = `${Math.min(this.full, HIGHEST)}px`;
    for (const item of this.drawn.values()) item.remove();
    this.drawn.clear();
    this.scrollTo(top);
    this.fill();
  }

  /** Height of all rows. */
  get full() {
    return Math.ceil(this.count / this.across) * this.options.height;
  }

  /** Where the list is scrolled to, in pixels of all rows. */
  get top() {
    return this.element.scrollTop + this.offset;
  }

  /**
   * Of a list that is too high, its element stands for the part that is near; where in it goes with where in the list.
   * @param {number} top
   */
  scrollTo(top) {
    const room = this.element.clientHeight;
    const hidden = Math.max(0, this.full - room);
    const wanted = Math.min(Math.max(0, top), hidden);
    const real = this.full > HIGHEST ? Math.round((wanted / hidden) * (HIGHEST - room)) : wanted;
    this.element.scrollTop = real;
    this.seen = this.element.scrollTop;
    this.offset = this.full > HIGHEST ? Math.round(wanted - real) : 0;
    for (const [place, item] of this.drawn) this.put(place, item);
  }

  scrolled() {
    if (this.full > HIGHEST) {
      const { scrollTop, clientHeight } = this.element;
      const [far, last] = [HIGHEST - clientHeight, this.full - clientHeight];
      const step = Math.abs(scrollTop - this.seen);
      const share = scrollTop / far;
      // The bar was dragged: to its place in the whole list. Else pixel by pixel, until the two are far apart.
      if (step > 2 * clientHeight) this.scrollTo(share * last);
      else if (step && Math.abs(this.top / last - share) > Math.min(0.01, share / 2, (1 - share) / 2)) {
        this.scrollTo(this.top);
      }
      this.seen = this.element.scrollTop;
    }
    this.fill();
  }

  /** Draw what is in sight and is not there yet; forget what is far away. */
  fill() {
    const { height, draw } = this.options;
    const first = Math.max(0, Math.floor(this.top / height) - AHEAD) * this.across;
    const rows = Math.ceil(this.element.clientHeight / height) + 2 * AHEAD + 1;
    const last = Math.min(this.count, first + rows * this.across);
    for (const [place, item] of this.drawn) {
      if (place < first || place >= last) {
        item.remove();
        this.drawn.delete(place);
      }
    }
    const fresh = document.createDocumentFragment();
    for (let place = first; place < last; place += 1) {
      if (!this.drawn.has(place)) fresh.append(this.place(place, draw(place)));
    }
    this.space.append(fresh);
  }

  /**
   * @param {number} place
   * @param {HTMLElement} item
   */
  place(place, item) {
    const column = place % this.across;
    item.classList.add('item');
    item.classList.toggle('chosen', place === this.chosen);
    item.setAttribute('role', 'option');
    item.setAttribute('aria-selected', String(place === this.chosen));
    item.setAttribute('aria-posinset', String(place + 1));
    item.setAttribute('aria-setsize', String(this.count));
    item.id = `item-${place}`;
    item.dataset.place = String(place);
    item.style.height = `${this.options.height}px`;
    item.style.left = `${(100 * column) / this.across}%`;
    item.style.width = `${100 / this.across}%`;
    this.put(place, item);
    this.drawn.set(place, item);
    return item;
  }

  /**
   * @param {number} place
   * @param {HTMLElement} item
   */
  put(place, item) {
    const top = Math.floor(place / this.across) * this.options.height - this.offset;
    item.style.transform = `translateY(${top}px)`;
  }

  /**
   * Draw an item again.
   * @param {number} place
   */
  refresh(place) {
    const old = this.drawn.get(place);
    if (old) old.replaceWith(this.place(place, this.options.draw(place)));
  }

  /**
   * Choose an item, and bring it into sight.
   * @param {number} place
   */
  choose(place) {
    const before = this.chosen;
    this.chosen = place;
    const { height } = this.options;
    const top = Math.floor(place / this.across) * height;
    const { clientHeight } = this.element;
    if (place >= 0 && top < this.top) this.scrollTo(top - height);
    else if (place >= 0 && top + height > this.top + clientHeight) this.scrollTo(top + 2 * height - clientHeight);
    this.fill();
    for (const [each, on] of /** @type {[number, boolean][]} */ ([
      [before, false],
      [place, true],
    ])) {
      const item = this.drawn.get(each);
      if (!item || (each === before && before === place && !on)) continue;
      item.classList.toggle('chosen', on);
      item.setAttribute('aria-selected', String(on));
    }
    this.element.setAttribute('aria-activedescendant', `item-${place}`);
  }
}
