import js from '@eslint/js';
import globals from 'globals';

export default [
  js.configs.recommended,
  {
    languageOptions: { globals: globals.browser },
    rules: {
      'no-control-regex': 'off', // control characters are what is looked for
      'no-self-compare': 'off', // not a number
      'max-lines': ['error', 300],
      'no-restricted-properties': [
        'error',
        { property: 'innerHTML', message: 'labels and texts are untrusted: textContent' },
        { property: 'outerHTML', message: 'labels and texts are untrusted: textContent' },
        { property: 'insertAdjacentHTML', message: 'labels and texts are untrusted: textContent' },
      ],
      eqeqeq: 'error',
      'prefer-const': 'error',
    },
  },
];
