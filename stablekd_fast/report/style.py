"""The report's style sheet. Python, so that it is installed wherever the package is."""

STYLE_SHEET = """
:root {
  --page: #fcfcfb; --text: #1d2125; --soft: #5c6570; --rule: #dcdfe3; --grid: #e6e8eb; --band: #f3f4f6;
}
@media (prefers-color-scheme: dark) {
  :root { --page: #15181c; --text: #e6e8ea; --soft: #9aa4af; --rule: #353b43; --grid: #2a3037; --band: #1d2228; }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 0.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 0.35rem; }
h3 { font-size: 0.95rem; margin: 1.25rem 0 0.5rem; }
section { margin-top: 2.5rem; padding-top: 1.25rem; border-top: 1px solid var(--rule); }
.note { margin: 0 0 1rem; max-width: 48rem; color: var(--soft); font-size: 0.9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 600; text-align: left; white-space: nowrap; }
th, td { padding: 0.45rem 0.9rem 0.45rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
.numbers th:not(:first-child), .numbers td:not(:first-child) { text-align: right; white-space: nowrap; }
.strong { font-weight: 650; }
figure { margin: 1rem 0 0; min-width: 36rem; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: currentColor; font-family: inherit !important; }
.legend { margin: 0; display: flex; flex-wrap: wrap; gap: 0.3rem 1.4rem; font-size: 0.9rem; }
.chip i {
  display: inline-block; width: 0.8em; height: 0.8em; margin-right: 0.5em; border-radius: 0.2em;
  vertical-align: -0.05em;
}
dl { margin: 0; columns: 24rem 2; column-gap: 2.5rem; font-size: 0.875rem; }
dl div {
  display: flex; gap: 1rem; justify-content: space-between; padding: 0.25rem 0;
  border-bottom: 1px solid var(--rule); break-inside: avoid;
}
dt { color: var(--soft); flex: none; }
dd { margin: 0; text-align: right; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
"""
