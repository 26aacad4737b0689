// Decisions as the table that `report.apply_review()` reads, and tables that people have edited.

/** @typedef {{ decision: 'keep' | 'relabel' | 'drop' | 'skip', label: number | null }} Decision */

/** What people write, by what it means; the same words as `apply_review` knows. */
const MEANT = new Map(
  Object.entries({
    keep: ['keep', 'kept', 'ok', 'okay', 'correct', 'right'],
    relabel: ['relabel', 'relabelled', 'relabeled', 'change', 'changed', 'wrong', 'accept', 'accepted'],
    drop: ['drop', 'dropped', 'remove', 'removed', 'delete', 'deleted'],
    skip: ['?', 'undecided', 'unsure', 'skip'],
  }).flatMap(([decision, words]) => words.map((word) => [word, decision])),
);

const ANSWERS = ['decision', 'new_label', 'new_label_name'];
const NUMBERS = ['label', 'suggested', 'rank', 'wrong_probability'];
const WRITTEN = [...ANSWERS, 'index', ...NUMBERS];

/** @param {string} name Of a column, as people write it. */
const plain = (name) => name.trim().toLowerCase().replaceAll(' ', '_');

/** @param {string} name Of a class, without what keeps spreadsheets from running it. */
const bare = (name) => name.trim().replace(/^'/, '').trim();

/** How a class can be called, the surest first. */
const CALLED = [
  (/** @type {string} */ name) => name.trim(),
  (/** @type {string} */ name) => name.trim().toLowerCase(),
  bare,
  (/** @type {string} */ name) => bare(name).toLowerCase(),
];

/**
 * Write decisions as CSV: a label by its number and by its name, which may be another one's number.
 * @param {import('./audit.js').Audit} audit
 * @param {Map<number, Decision>} decisions By dataset index.
 */
export function toCsv(audit, decisions) {
  const more = NUMBERS.filter((name) => audit.columns.has(name));
  const answers = audit.labelled ? ANSWERS : ['decision'];
  const lines = [[...answers, 'index', ...more].join(',')];
  for (const [index, { decision, label }] of decisions) {
    const row = audit.rows.get(index);
    if (row === undefined) continue;
    const wanted = label === null ? ['', ''] : [String(label), text(audit.label(label))];
    const cells = audit.labelled ? [decision, ...wanted] : [decision];
    const numbers = more.map((name) => cell(audit.value(name, row)));
    lines.push([...cells, String(index), ...numbers].join(','));
  }
  return lines.map((line) => `${line}\r\n`).join('');
}

/** @param {string} name Quoted, and nothing that a spreadsheet could run. */
function text(name) {
  const safe = /^[=+@\t\r-]/.test(name) ? `'${name}` : name;
  return /[",;\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

/** @param {number} value */
function cell(value) {
  return Number.isFinite(value) ? String(Number(value.toPrecision(6))) : '';
}

/**
 * Read decisions from CSV.
 * @param {import('./audit.js').Audit} audit
 * @param {string} text
 * @returns {{ decisions: Map<number, Decision>, wrong: string[], others: string[] }} What was understood, what was not,
 *   and columns that are neither decisions nor the audit's.
 */
export function fromCsv(audit, text) {
  const lines = records(text.replace(/^\ufeff/, '').replace(/^sep=.\r?\n/, ''));
  const names = (lines.shift() ?? []).map(plain);
  if (!names.includes('index') || !(names.includes('decision') || names.includes('new_label'))) {
    throw new Error('the table has no columns `index` and `decision`; expected an exported review or candidates.csv');
  }
  const named = CALLED.map((way) => {
    /** @type {Map<string, Set<number>>} */
    const labels = new Map();
    for (const label of audit.classes) {
      const name = way(audit.label(label));
      labels.set(name, (labels.get(name) ?? new Set()).add(label));
    }
    return labels;
  });
  /** @type {Map<number, Decision>} */
  const decisions = new Map();
  /** @type {string[]} */
  const wrong = [];
  lines.forEach((cells, line) => {
    const get = (/** @type {string} */ name) => (cells[names.indexOf(name)] ?? '').trim();
    const answer = get('decision').toLowerCase();
    const [wanted, name] = [get('new_label'), get('new_label_name')];
    if (!answer && !wanted && !name) return;
    const told = understood(audit, named, get('index'), answer, [wanted, name], get('label'));
    if (typeof told === 'string') wrong.push(`row ${line + 2}: ${told}`);
    else decisions.set(told.index, told.decision);
  });
  const own = new Set([...WRITTEN, 'text', ...audit.columns.keys()].map(plain));
  const others = names.filter((name) => name && !own.has(name) && !own.has(name.replace(/_name$/, '')));
  return { decisions, wrong, others };
}

/**
 * @param {import('./audit.js').Audit} audit
 * @param {Map<string, Set<number>>[]} named By each of `CALLED`.
 * @param {string} where
 * @param {string} answer
 * @param {[string, string]} wanted By number or name, and by name alone.
 * @param {string} given
 * @returns {string | { index: number, decision: Decision }}
 */
function understood(audit, named, where, answer, [wanted, name], given) {
  const index = Number(where);
  const row = where === '' ? undefined : audit.rows.get(index);
  if (row === undefined) return `the audit has no example ${where || 'without an index'}`;
  const decision = answer ? MEANT.get(answer) : 'relabel';
  if (!decision) return `“${answer}” is none of keep, relabel, drop, skip`;
  if (given !== '' && Number.isInteger(Number(given)) && Number(given) !== audit.given(row)) {
    return `the label of example ${index} is ${given} here and ${audit.given(row)} in the audit`;
  }
  if (decision !== 'relabel') return { index, decision: { decision: /** @type {any} */ (decision), label: null } };
  const called = (/** @type {string} */ name) => CALLED.map((way, k) => named[k].get(way(name))).find(Boolean);
  let meant = audit.classes; // by number or by name, as `apply_review` takes it
  if (wanted) meant = meant.filter((each) => each === Number(wanted) || called(wanted)?.has(each));
  if (name) meant = meant.filter((each) => called(name)?.has(each));
  const asked = [wanted, name].filter(Boolean).join(' and ');
  if (asked && meant.length > 1) return `“${asked}” can be any of the classes ${meant.join(', ')}`;
  const label = asked ? meant[0] : audit.suggested(row);
  if (label === undefined || label < 0) return `“${asked}” is no class of the audit`;
  if (label === audit.given(row)) return { index, decision: { decision: 'keep', label: null } };
  return { index, decision: { decision: 'relabel', label } };
}

/**
 * The records of a table, with quotes; the separator is what the first line has most of.
 * @param {string} text
 * @returns {string[][]}
 */
export function records(text) {
  const first = text.split('\n', 1)[0];
  const counts = [',', ';', '\t'].map((each) => first.split(each).length);
  const separator = [',', ';', '\t'][counts.indexOf(Math.max(...counts))];
  const found = [];
  let [record, cell, quoted] = [/** @type {string[]} */ ([]), '', false];
  for (let i = 0; i < text.length; i += 1) {
    const letter = text[i];
    if (quoted) {
      if (letter !== '"') cell += letter;
      else if (text[i + 1] === '"') cell += text[(i += 1)];
      else quoted = false;
    } else if (letter === '"') quoted = true;
    else if (letter === separator) [cell] = ['', record.push(cell)];
    else if (letter === '\n') {
      record.push(cell.replace(/\r$/, ''));
      found.push(record);
      [record, cell] = [[], ''];
    } else cell += letter;
  }
  if (cell || record.length) found.push([...record, cell]);
  return found.filter((each) => each.some((text) => text.trim()));
}
