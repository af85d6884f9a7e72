"""The page's style sheet: light or dark as the reader's system is, two columns or one as wide as the screen is."""

from . import draw

FONTS = 'system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"Liberation Sans",sans-serif'
CSS = f"""
:root {{color-scheme:light dark;--page:#ffffff;--card:#f5f7fa;--line:#dfe3ea;--ink:#1d2430;--muted:#596377;
  --note:#fff6e0;--note-line:#e6b84a;--heat:11,92,173;{draw.LIGHT_VARIABLES}}}
@media (prefers-color-scheme:dark) {{:root {{--page:#12161d;--card:#1a2029;--line:#2e3542;--ink:#e8ebf0;--muted:#9aa4b5;
  --note:#2b2413;--note-line:#8a6a1e;--heat:108,178,255;{draw.DARK_VARIABLES}}}}}
* {{box-sizing:border-box}}
html {{-webkit-text-size-adjust:100%}}
body {{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 {FONTS}}}
main {{max-width:1180px;margin:0 auto;padding:3.5rem 1.5rem 4rem}}
h1 {{font-size:clamp(1.9rem,4.5vw,2.9rem);line-height:1.1;letter-spacing:-.025em;margin:0 0 .9rem;font-weight:700}}
h2 {{font-size:1.4rem;line-height:1.2;letter-spacing:-.012em;margin:3.2rem 0 .4rem;padding-top:1.5rem;
  border-top:1px solid var(--line)}}
p {{margin:0 0 1rem;max-width:48rem}}
.eyebrow {{color:var(--0b5cad);font-size:.8rem;font-weight:650;letter-spacing:.06em;text-transform:uppercase}}
.lead {{font-size:1.12rem;color:var(--muted);max-width:54rem}}
.about {{color:var(--muted);margin-bottom:1.3rem}}
.notes {{list-style:none;margin:1.2rem 0 0;padding:.75rem 1rem;background:var(--note);max-width:54rem;font-size:.95rem;
  border-left:3px solid var(--note-line);border-radius:0 8px 8px 0;overflow-wrap:anywhere}}
.notes li+li {{margin-top:.35rem}}
.tiles {{display:grid;grid-template-columns:repeat(auto-fit,minmax(195px,1fr));gap:.9rem;margin:2rem 0 0}}
.tile {{background:var(--card);border-radius:12px;padding:1.05rem 1.15rem 1.1rem}}
.tile dt {{color:var(--muted);font-size:.83rem;font-weight:600;line-height:1.3}}
.tile dd {{margin:0;color:var(--muted);font-size:.83rem;line-height:1.4}}
.tile dd.number {{margin:.3rem 0 .35rem;color:var(--ink);font-size:1.5rem;font-weight:700;letter-spacing:-.025em;
  line-height:1.15}}
.figures {{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:2.2rem 2.4rem}}
.panels {{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,310px),1fr));gap:1.6rem}}
.pictures {{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:1.2rem}}
.bitmaps {{display:flex;flex-wrap:wrap;gap:1.4rem;align-items:flex-end}}
figure {{margin:0;min-width:0}}
figcaption {{font-weight:650;font-size:.98rem;margin-bottom:.35rem}}
.pictures figcaption,.bitmaps figcaption {{font-weight:500;font-size:.85rem;color:var(--muted);margin:.35rem 0 0}}
figure svg {{display:block;width:100%;height:auto;overflow:visible}}
svg text {{font-family:{FONTS}!important;font-variant-numeric:tabular-nums}}
img {{display:block;max-width:100%;height:auto;image-rendering:pixelated}}
.pictures img {{width:100%;border-radius:6px}}
.bitmaps img {{border:1px solid var(--line);background:#fff}}
.scroll {{overflow-x:auto;margin:0 0 1rem}}
table {{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums;white-space:nowrap;width:100%}}
th,td {{padding:.36rem .6rem;text-align:right}}
th:first-child,td:first-child {{text-align:left;padding-left:0}}
th {{color:var(--muted);font-weight:600;vertical-align:bottom;line-height:1.25}}
thead tr:last-child th {{border-bottom:1.5px solid var(--muted)}}
thead .group {{padding-bottom:.1rem;font-size:.8rem;font-weight:500}}
thead .group:not(:empty) {{border-bottom:1px solid var(--line)}}
tbody td {{border-bottom:1px solid var(--line)}}
tbody tr:hover td {{background:var(--card)}}
.heat th:not(:first-child),.heat td:not(:first-child) {{text-align:center;padding:.36rem .3rem}}
.heat td:not(:first-child) {{border:2px solid var(--page)}}
.range {{color:var(--muted);font-size:.85em}}
.key {{display:flex;flex-wrap:wrap;gap:.35rem 1.4rem;list-style:none;margin:0 0 1.4rem;padding:0;font-size:.9rem;
  color:var(--muted)}}
.key b {{color:var(--ink);font-weight:600}}
.key i {{display:inline-block;width:1.2em;height:0;border-top:3px solid;vertical-align:.28em;margin-right:.5em}}
details {{margin:1.2rem 0}}
summary {{cursor:pointer;font-weight:600}}
details .scroll {{margin-top:.8rem}}
.settings td {{text-align:left;vertical-align:top}}
.settings td+td {{white-space:normal;overflow-wrap:anywhere;font:.82rem/1.5 ui-monospace,Menlo,Consolas,monospace}}
footer {{margin-top:3.5rem;padding-top:1.2rem;border-top:1px solid var(--line);color:var(--muted);font-size:.88rem}}
footer p {{margin:0 0 .3rem;max-width:none}}
@media (max-width:760px) {{
  main {{padding:2rem 1.05rem 3rem}}
  h2 {{margin-top:2.6rem}}
  .lead {{font-size:1.03rem}}
  .figures {{grid-template-columns:minmax(0,1fr)}}
  .tiles {{grid-template-columns:repeat(2,minmax(0,1fr));gap:.7rem}}
  .tile {{padding:.85rem .9rem}}
  .tile dd.number {{font-size:1.35rem}}
  .tile:last-child:nth-child(odd) {{grid-column:1/-1}}
  .pictures {{grid-template-columns:repeat(3,minmax(0,1fr));gap:.8rem}}
}}
@media print {{h2 {{break-after:avoid}} figure,.tile {{break-inside:avoid}}}}
"""
