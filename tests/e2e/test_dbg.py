import asyncio, httpx, time, pytest, subprocess
from tests.e2e.conftest import *
@pytest.mark.cluster
async def test_x(cluster):
    import re
    cfg=subprocess.run(f"cat {cluster._directory}/h/*/haproxy.cfg", shell=True, capture_output=True, text=True).stdout
    port=re.search(r"server SERVE_REPLICA\S+ 127.0.0.1:(\d+)",cfg)[1]
    for base in (f"http://127.0.0.1:{port}", cluster.url):
        long = dict(model="tiny", prompt="Once upon a time", max_tokens=496, ignore_eos=True)
        async with httpx.AsyncClient() as c:
            try: await c.post(base+"/v1/completions", json=long, timeout=0.3)
            except Exception as e: print(repr(e))
        print(subprocess.run("ss -tnp | grep haproxy | grep -v ESTAB", shell=True, capture_output=True, text=True).stdout)
        t=time.time()
        while time.time()-t<2:
            mm=Metrics(cluster.url)
            print(round(time.time()-t,2), mm.total("running_requests"), mm.total("tokens_total"), mm.total("http_requests_held"), mm.total("http_requests_total",outcome="disconnected"), mm.total("http_requests_total",outcome="ok"))
            await asyncio.sleep(0.2)
