// Texts of training examples, shaded by what each token adds to a score: blue over a line for, orange over dashes against.

import { clean } from './audit.js';
import { h, number } from './dom.js';

const NAMED = 3; // tokens that are told to those who don't see colours

/**
 * The text of a pair's training example, each token as strong as it is beside the largest; nothing without scores.
 * @param {import('./audit.js').Pair} pair
 */
export function shadedText({ tokens, tokens_rest: rest }) {
  if (!tokens?.length) return null;
  const most = Math.max(...tokens.map(([, score]) => Math.abs(score ?? 0)), 1e-30);
  // Some tokenizers keep the spaces in their tokens.
  const glue = tokens.some(([text]) => /^\s|\s$/.test(text)) ? '' : ' ';
  const parts = tokens.flatMap(([text, score], place) => {
    const strength = Math.abs(score ?? 0) / most;
    const style = { '--strength': `${Math.round(100 * strength)}%` };
    const about = { class: `token ${kind(score ?? 0)}`, style, title: number(score ?? NaN) };
    return [place ? glue : '', strength > 0.02 ? h('span', about, clean(text)) : clean(text)];
  });
  const strongest = tokens
    .filter(([, score]) => score)
    .sort((a, b) => Math.abs(b[1] ?? 0) - Math.abs(a[1] ?? 0))
    .slice(0, NAMED)
    .map(([text, score]) => `${clean(text).trim()} ${number(score ?? NaN)}`);
  const told = [`strongest: ${strongest.join(', ')}`, ...(rest ? [`of no token: ${number(rest)}`] : [])].join('; ');
  return h('span', { class: 'snippet shaded', title: told, 'aria-description': told }, parts);
}

/** @param {number} score */
const kind = (score) => (score > 0 ? 'proponent' : 'opponent');

/** What the shades mean. */
export function tokenLegend() {
  const sample = (/** @type {number} */ score, /** @type {string} */ told) =>
    h('span', {}, h('span', { class: `token ${kind(score)}`, 'aria-hidden': 'true' }, 'word'), ` ${told}`);
  return h(
    'p',
    { class: 'legend tokens' },
    'Tokens by their part of the score:',
    sample(1, 'blue over a line: positive, makes the query better;'),
    sample(-1, 'orange over dashes: negative, makes it worse'),
  );
}
