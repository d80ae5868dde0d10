"""The report's style sheet, for light and dark."""

from __future__ import annotations

STYLE = """
:root{--paper:#fbfbf9;--card:#fff;--ink:#1d2129;--soft:#5d6470;--faint:#8a919c;--rule:#e6e6e1;--accent:#2563c9;
--band:#2563c922;--up:#15784a;--upbg:#e3f4ea;--down:#b3372f;--downbg:#fbe9e7;
--c0:#2563c9;--c1:#e08a1e;--c2:#2f9e77;--c3:#b0509c;--c4:#8a919c;--c5:#c9b037}
@media(prefers-color-scheme:dark){:root{--paper:#14161a;--card:#1c1f25;--ink:#eceef1;--soft:#a9b0bb;--faint:#7d8591;
--rule:#2c3038;--accent:#79a8f5;--band:#79a8f52b;--up:#6fd3a0;--upbg:#173427;--down:#f09890;--downbg:#3d2220;
--c0:#79a8f5;--c1:#e9a857;--c2:#5cc49f;--c3:#d488c4;--c4:#7d8591;--c5:#d9c766}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1060px;margin:0 auto;padding:40px 24px 72px}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .5rem;letter-spacing:-.015em;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:0 0 .2rem;letter-spacing:-.005em}
h3{font-size:.95rem;margin:2.2rem 0 .6rem;color:var(--soft);font-weight:600}
section{margin-top:44px}
.note{color:var(--soft);font-size:.9rem;margin:0 0 .9rem}
.chips{list-style:none;display:flex;flex-wrap:wrap;gap:6px 22px;margin:0;padding:0;font-size:.95rem}
.chips span{color:var(--faint)}
.chips li{overflow-wrap:anywhere}
.headline{display:flex;flex-wrap:wrap;align-items:center;gap:10px 28px;margin:26px 0 12px;padding:22px 26px;
background:var(--card);border:1px solid var(--rule);border-radius:14px}
.headline span{display:block;color:var(--faint);font-size:.85rem}
.headline strong{font-size:2.5rem;line-height:1.15;font-weight:650;letter-spacing:-.02em;
font-variant-numeric:tabular-nums}
.headline .after{color:var(--accent)}
.headline .arrow{font-size:1.9rem;color:var(--faint)}
.gain{margin-left:auto;padding:8px 16px;border-radius:10px;text-align:right}
.gain strong{display:block;font-size:1.35rem}
.gain small{font-size:.9rem}
.gain.up{color:var(--up);background:var(--upbg)}
.gain.down{color:var(--down);background:var(--downbg)}
.plot{position:relative;height:96px;margin:10px 8px 26px 46px;font-size:.72rem;color:var(--faint);
font-variant-numeric:tabular-nums}
.plot.tall{height:300px;margin:14px 10px 30px 56px;font-size:.8rem}
.plot svg{position:absolute;inset:0;width:100%;height:100%;overflow:visible}
.line{fill:none;stroke:var(--accent);stroke-width:1.75;vector-effect:non-scaling-stroke;stroke-linejoin:round}
.tall .line{stroke-width:2.25}
.band{fill:var(--band)}
.rule{stroke:var(--rule);stroke-width:1;vector-effect:non-scaling-stroke}
.plot .y{position:absolute;right:100%;transform:translateY(-50%);padding-right:8px;white-space:nowrap}
.plot .x{position:absolute;top:100%;transform:translateX(-50%);padding-top:6px}
.plot .dot,.hit b{position:absolute;width:8px;height:8px;margin:-4px;border-radius:50%;background:var(--accent);
box-shadow:0 0 0 2px var(--card)}
.hit{position:absolute;top:0;bottom:0}
.hit b{visibility:hidden}
.hit:hover b{visibility:visible}
.hit:hover::after{content:attr(data-tip);position:absolute;bottom:calc(100% + 4px);left:0;z-index:2;padding:3px 9px;
border-radius:6px;background:var(--ink);color:var(--paper);font-style:normal;font-size:.8rem;white-space:nowrap;
pointer-events:none}
.hit.left:hover::after{left:auto;right:0}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(230px,1fr));gap:14px}
.card{margin:0;padding:12px 14px 2px;background:var(--card);border:1px solid var(--rule);border-radius:12px;min-width:0}
.card figcaption{display:flex;justify-content:space-between;gap:10px;font-size:.88rem;color:var(--soft);
overflow-wrap:anywhere}
.card b{color:var(--ink);font-weight:600;font-variant-numeric:tabular-nums;white-space:nowrap}
.hit b{padding:0}
figure{margin:0}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:18px}
.pair figure:only-child{grid-column:1/-1}
.pair.wide{grid-template-columns:1fr}
.pair img,.strip img{display:block;width:100%;height:auto;border:1px solid var(--rule);border-radius:10px;
background:#fff}
.pair figcaption,.strip figcaption{font-size:.88rem;color:var(--soft);padding-top:6px}
.strip{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:12px}
.strip.wide{grid-template-columns:repeat(auto-fill,minmax(300px,1fr))}
.bar{display:flex;height:22px;border-radius:7px;overflow:hidden;gap:2px}
.bar i{min-width:2px}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 22px;margin:12px 0 0;padding:0;font-size:.9rem;
color:var(--soft)}
.legend i{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:8px}
.legend b{color:var(--ink);font-weight:600}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;width:100%}
td{border-top:1px solid var(--rule);padding:7px 12px 7px 0;white-space:nowrap}
td:last-child{text-align:right;padding-right:0;color:var(--soft)}
code,pre{font:.85rem/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:14px 16px;
overflow-x:auto;margin:14px 0 0}
summary{cursor:pointer;color:var(--soft);font-size:.95rem}
@media(max-width:640px){main{padding:24px 16px 56px}.pair{grid-template-columns:1fr}.plot.tall{height:220px}
.headline{gap:6px 18px;padding:16px 18px}.headline strong{font-size:1.9rem}.gain{margin-left:0}
.gain strong{font-size:1.2rem}}
"""
