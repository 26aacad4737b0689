"""TensorBoard side of the audit: what is written to event files and the tab that shows it.

| tag | dashboard | content | written by |
|---|---|---|---|
| `influence/<column>/log10` | Histograms | log10 of the positive finite values | `numbers.write_histogram` |
| `influence/<column>/zero`, `/negative`, `/non_finite` | Scalars | what it leaves out | `numbers.write_histogram` |
| `influence/candidates`, `/2`, `/3`, … | Images | nine candidates each | `candidate_sheets.write_candidates` |
| `influence/candidates/text_summary` | Text | table of candidates | `candidate_sheets.write_candidates` |
| `influence/detection/<column>` | PR Curves | how it finds known label noise | `numbers.write_detection` |
| `influence/queries/1`, `/2`, … | Images | a query and its pairs | `query_sheets.write_queries` |
| `influence/queries/text_summary` | Text | table of the same pairs | `query_sheets.write_queries` |
| `influence/queries/texts/text_summary` | Text | what these say, if they are texts | `query_sheets.write_queries` |
| `influence/<name>` | Scalars | numbers about the audit itself | the loggers of the trainer |

No code on purpose: TensorBoard imports this package to find the plugin, so nothing here may pull in torch.
"""
