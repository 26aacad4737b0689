"""What a run's loggers show of its audit.

| tag | what | made by |
|---|---|---|
| `influence/<column>/log10` | histogram of log10 of the positive finite values | `numbers.log_histogram` |
| `influence/candidates`, `/2`, `/3`, … | pictures of nine each; their table | `candidate_sheets` |
| `influence/detection/<column>` | curve: how a column finds known label noise | `numbers.detection_curves` |
| `influence/queries/1/<list>`, … | picture of a query and its pairs | `query_sheets` |
| `influence/queries`, `influence/queries/texts` | the same pairs; what they say, if texts | `query_sheets` |
| `influence/summary` | table of the numbers of the audit as a whole | `summary` |
| `audit/<name>`, `recording/<name>` | what the Influence tab of TensorBoard reads | `page.document` |

`exhibits` has the kinds of things, `writers` how each logger shows them.
"""
