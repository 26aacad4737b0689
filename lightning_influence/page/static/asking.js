// How to ask about new examples: with the model, which a page has not.

import { button, h } from './dom.js';

/**
 * @param {import('./audit.js').Audit} audit
 * @returns {HTMLElement | null} Nothing for an audit without an index.
 */
export function asking({ ask }) {
  if (!ask) return null;
  const lines = h('pre', { tabindex: '0', 'aria-label': 'code' }, ask);
  const copy = button('copy', async () => {
    try {
      await navigator.clipboard.writeText(ask);
      copy.textContent = 'copied';
    } catch {
      // In a frame, or over plain HTTP from another machine: then they are marked, and a key does the rest.
      getSelection()?.selectAllChildren(lines);
      copy.textContent = 'marked: press Ctrl+C';
    }
  });
  return h(
    'section',
    { class: 'asking' },
    h('h3', {}, 'Ask about new examples'),
    h('p', { class: 'muted' }, 'This audit has an index: these lines name the training examples behind any prediction.'),
    lines,
    copy,
  );
}
