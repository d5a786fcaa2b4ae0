"""The report's style sheet: one page, light or dark as the reader's system asks, desk or phone."""

__all__ = ["CSS"]

CSS = """
:root { color-scheme: light dark;
  --paper:#fbfaf7; --card:#ffffff; --ink:#1d1c1a; --soft:#6a6761; --rule:#e4e0d8;
  --staged:#d5e8e4; --persisted:#9fd0c7; --attested:#56aa9d; --certified:#0d6b60;
  --kill:#c8401a; --agent:#b07a00; --line:#3a56d4; --mixture:#b3123f; --older:#d3a13a;
  --scratch:#a8754a; --error:#8d8880; --tint:#f1eee7; }
@media (prefers-color-scheme: dark) { :root {
  --paper:#15171a; --card:#1c1f23; --ink:#ece9e3; --soft:#9b978f; --rule:#31353b;
  --staged:#23403c; --persisted:#2c6a60; --attested:#36a191; --certified:#46cdb8;
  --kill:#ff7a52; --agent:#e8b23c; --line:#93a6ff; --mixture:#ff5c86; --older:#e0b75a;
  --scratch:#c79b74; --error:#8b8780; --tint:#22262b; } }
* { box-sizing:border-box; }
body { margin:0; background:var(--paper); color:var(--ink); line-height:1.55;
  font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif; }
main { max-width:1120px; margin:0 auto; padding:40px 40px 72px; }
header .mark { font-weight:650; letter-spacing:.02em; color:var(--certified); }
header .mark span { color:var(--soft); font-weight:400; }
h1 { font-size:clamp(1.9rem,4.6vw,3.1rem); line-height:1.08; letter-spacing:-.025em;
  margin:.5em 0 .35em; font-weight:680; text-wrap:balance; }
h1 em { font-style:normal; color:var(--certified); } h1.bad em { color:var(--mixture); }
.lead { max-width:46em; color:var(--soft); font-size:1.06rem; margin:0 0 28px; }
h2 { font-size:1.28rem; letter-spacing:-.01em; margin:56px 0 6px; }
h2 + p { margin-top:0; max-width:48em; color:var(--soft); }
.card { background:var(--card); border:1px solid var(--rule); border-radius:12px;
  padding:20px 22px; margin-top:16px; }
.facts { display:grid; grid-template-columns:repeat(5,1fr); padding:0; overflow:hidden; }
.facts div { padding:16px 20px; border-left:1px solid var(--rule); }
.facts div:first-child { border-left:0; }
.facts b { display:block; font-size:1.75rem; line-height:1.15; font-weight:650;
  font-variant-numeric:tabular-nums; }
.facts span { color:var(--soft); font-size:.88rem; }
.facts .none b { color:var(--certified); } .facts .some b { color:var(--mixture); }
.digests { display:grid; grid-template-columns:auto 1fr auto 1fr; gap:6px 16px;
  align-items:baseline; }
.digests .head { color:var(--soft); font-size:.88rem; }
.digests code { font:500 .86rem/1.5 ui-monospace,SFMono-Regular,Menlo,monospace;
  overflow-wrap:anywhere; }
.digests .sign { font-weight:700; font-size:1.15rem; color:var(--certified); }
.digests .sign.bad { color:var(--mixture); }
svg { display:block; width:100%; height:auto; font:11px system-ui,sans-serif; overflow:visible; }
svg text { fill:var(--ink); } .tick { fill:var(--soft); font-variant-numeric:tabular-nums; }
svg .tick, svg .axis, svg .faint { fill:var(--soft); } svg .lane { font-weight:600; }
.wide { display:block; } .narrow { display:none; }
.grid { stroke:var(--rule); stroke-width:1; } .base { stroke:var(--rule); stroke-width:1; }
.progress { fill:none; stroke:var(--ink); stroke-width:1.6; stroke-linejoin:round; }
rect.staged { fill:var(--staged); } rect.persisted { fill:var(--persisted); }
rect.attested { fill:var(--attested); } rect.certified { fill:var(--certified); }
rect.undone { opacity:.38; } rect.chosen { stroke:var(--line); stroke-width:1.2; }
.episode { fill:var(--tint); }
line.kill { stroke:var(--kill); stroke-width:1; stroke-dasharray:2 3; opacity:.8; }
line.kill.agent { stroke:var(--agent); }
line.kill.strong { stroke-width:2; stroke-dasharray:none; opacity:1; }
circle.badge { fill:var(--kill); } circle.badge.agent { fill:var(--agent); }
svg text.badge-text { fill:var(--paper); font-weight:700; font-size:9.5px; }
svg text.kill-word { fill:var(--kill); font-weight:700; letter-spacing:.04em; }
line.recovery { stroke:var(--line); stroke-width:1.3; } .recovery-dot { fill:var(--line); }
path.arc { fill:none; stroke:var(--line); stroke-width:1.6; }
path.truth { fill:none; stroke:var(--persisted); stroke-width:6; stroke-linejoin:round;
  stroke-linecap:round; }
path.killed { fill:none; stroke:var(--ink); stroke-width:1.3; stroke-linejoin:round; }
.legend { display:flex; flex-wrap:wrap; gap:6px 20px; margin:0 0 14px; padding:0; list-style:none;
  color:var(--soft); font-size:.88rem; }
.legend li { display:inline-flex; align-items:center; gap:7px; }
.legend i { display:inline-block; flex:none; border-radius:1px; }
.peers { padding:0; } .peer { padding:18px 22px; border-top:1px solid var(--rule); }
.peer:first-child { border-top:0; }
.peer h3 { margin:0; font-size:1rem; } .peer p { margin:4px 0 0; font-size:.9rem;
  color:var(--soft); max-width:62em; }
.bar { display:flex; gap:2px; height:30px; margin:10px 0 8px; }
.bar span { border-radius:4px; color:var(--paper); font-weight:650; font-size:.88rem;
  display:flex; align-items:center; justify-content:center; min-width:22px;
  font-variant-numeric:tabular-nums; }
.newest { background:var(--certified); } .older { background:var(--older); }
.scratch { background:var(--scratch); } .abandoned { background:var(--line); }
.error { background:var(--error); } .mixture { background:var(--mixture); }
.counts { color:var(--soft); font-size:.9rem; } .counts b { color:var(--ink); }
.counts .hot, .counts .hot b { color:var(--mixture); }
.counts .calm b { color:var(--certified); }
.proof { font:500 .82rem/1.5 ui-monospace,Menlo,monospace; overflow-wrap:anywhere; }
table { border-collapse:collapse; width:100%; font-size:.9rem;
  font-variant-numeric:tabular-nums; }
th { text-align:left; font-weight:600; color:var(--soft); } th,td { padding:6px 14px 6px 0;
  border-bottom:1px solid var(--rule); vertical-align:top; }
tr:last-child td { border-bottom:0; } .scroll { overflow-x:auto; }
details summary { cursor:pointer; font-weight:600; }
details[open] summary { margin-bottom:10px; }
dl { display:grid; grid-template-columns:max-content 1fr; gap:4px 20px; margin:0;
  font-size:.92rem; }
dt { color:var(--soft); } dd { margin:0; overflow-wrap:anywhere; }
ul.plain { margin:0; padding-left:1.1em; max-width:60em; } ul.plain li { margin:.35em 0; }
footer { margin-top:56px; color:var(--soft); font-size:.86rem; }
@media (max-width:720px) {
  main { padding:24px 16px 48px; } .card { padding:14px; border-radius:10px; }
  .wide { display:none; } .narrow { display:block; }
  .facts { grid-template-columns:1fr 1fr; padding:0; }
  .facts div { border-left:0; border-top:1px solid var(--rule); padding:12px 14px; }
  .facts div:nth-child(-n+2) { border-top:0; }
  .facts div:nth-child(even) { border-left:1px solid var(--rule); }
  .facts div:last-child:nth-child(odd) { grid-column:1 / -1; }
  .peers { padding:0; } .peer { padding:14px; }
  .digests { grid-template-columns:1fr; gap:2px; } .digests .sign { line-height:1; }
  .digests .head:not(.row) { display:none; } .digests .row { margin-top:10px; }
  h2 { margin-top:40px; } dl { grid-template-columns:1fr; gap:0; } dd { margin-bottom:8px; }
}
@media print { details { display:block; } }
"""
