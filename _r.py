import sys, torch
from tests.test_recompute import *
import time
if __name__=="__main__":
    what=sys.argv[1]
    if what=="one":
        for f in [*FROZEN, LORA]:
            t=time.time()
            try: [r]=run(1, gradients_by_policy, f)
            except Exception as e: print(f, str(e)[-3000:]); continue
            w=r.pop("none"); print(f, len(w), {p: all(torch.equal(g[n],w[n]) for n in w) and g.keys()==w.keys() for p,g in r.items()}, [n for n in w if w[n].abs().max()==0], time.time()-t, flush=True)
    else:
        for st in sys.argv[2].split(","):
            for f in ([*FROZEN, LORA] if len(sys.argv)<4 else [sys.argv[3]]):
                t=time.time()
                try: r=run(2, engine_gradients_by_policy, st, f)[0]
                except Exception as e: print(st,f, str(e)[-3000:]); continue
                (w,b)=r.pop("none"); print(st, f, len(w), {p: (max((g[n]-w[n]).abs().max().item()/max(w[n].abs().max().item(),1e-9) for n in w), bb==b) for p,(g,bb) in r.items()}, time.time()-t, flush=True)
