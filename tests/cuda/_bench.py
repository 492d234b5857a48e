import sys, statistics, torch, torch.nn.functional as F, functools
from vitq.cuda import kernels as K
from vitq.cuda.triton import attention as A, epilogue as E, layer_norm as L, quantize as Q
from vitq.formats import *
from vitq.plan import *
from vitq.ops.linear import LinearSpec
from vitq.ops.layer_norm import LayerNormSpec
from vitq.ops.attention import AttentionSpec
from vitq.ops.common import OutputFormat
dev=torch.device("cuda"); torch.manual_seed(0)
print(torch.__version__, __import__("triton").__version__, torch.cuda.get_device_name())
R=6
def bench(fn, sets=None):
    """us a call: a graph of R calls, each on its own buffers; median and spread of replays"""
    args=[sets() for _ in range(R)] if sets else [()]*R
    s=torch.cuda.Stream(); s.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(s):
        for a in args: fn(*a)
    torch.cuda.current_stream().wait_stream(s); torch.cuda.synchronize()
    g=torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        keep=[fn(*a) for a in args]
    for _ in range(3): g.replay()
    ts=[]
    for _ in range(15):
        a,b=torch.cuda.Event(enable_timing=True),torch.cuda.Event(enable_timing=True)
        a.record(); g.replay(); b.record(); b.synchronize(); ts.append(a.elapsed_time(b)*1e3/R)
    ts.sort()
    return ts[7], ts[-2]-ts[1]
def show(name,*pairs):
    print(f"{name:44s}"+"  ".join(f"{n} {t:7.1f}±{d:.1f}" for n,(t,d) in pairs),flush=True)
st=lambda bits=8,s=.02,z=0: ActivationFormat(bits,scale=s,zero_point=z)
M=39400
h=lambda *s: torch.randn(*s,device=dev,dtype=torch.float16)
i8=lambda *s: torch.randint(-128,128,s,device=dev,dtype=torch.int8)
def out8(): return OutputFormat(8,torch.tensor(.05),torch.tensor(3,dtype=torch.int32))
def lin(n,k,act=None,output=None,dyn=False,bits=8,z=5):
    q=1<<(bits-1)
    p=LinearParams(torch.randint(-q,q,(n,k),dtype=torch.int8),bits,torch.rand(n)*.01,torch.randn(n),ActivationFormat(8,dynamic=True) if dyn else st(z=z))
    k_=K.CublasLtLinear(); return k_,k_.pack(LinearSpec(p,act,output),dev)
S=torch.tensor(.02,device=dev)
# quantize / LN
for C in (384,768,1536):
    q=K.TritonQuantize(); res=[]
    for el in (1024,2048,4096):
        Q.ELEMENTS=el
        for nm,f in (("static",st()),("dyn",ActivationFormat(8,dynamic=True))):
            p=q.pack(f,dev); res.append((f"{nm}{el}",bench(lambda x:q.run(p,x).codes,lambda:(h(M,C),))))
    Q.ELEMENTS=2048
    show(f"quantize {C} floor {M*C*3/4.3e6:.0f}",*res)
for C in (384,768):
    w,b=torch.ones(C,device=dev,dtype=torch.float16),torch.zeros(C,device=dev,dtype=torch.float16)
    ln=K.TritonLayerNorm(); res=[("F.layer_norm fp16",bench(lambda x:F.layer_norm(x,(C,),w,b,1e-6),lambda:(h(M,C),)))]
    for el in (512,1024,2048,4096):
        L.ELEMENTS=el
        for nm,f in (("st",st()),("dyn",ActivationFormat(8,dynamic=True))):
            p=ln.pack(LayerNormSpec(w,b,1e-6,f),dev); res.append((f"{nm}{el}",bench(lambda x:ln.run(p,x).codes,lambda:(h(M,C),))))
    L.ELEMENTS=2048
    show(f"LN+quantize {C} floor {M*C*3/4.3e6:.0f}",*res)
# linear
def run_lin(k_,p,dyn=False):
    def f(x,*r):
        y=k_.run(p,QTensor(x,r[-1] if dyn else S,0),dtype=torch.float16,residual=r[0] if len(r)-dyn else None)
        return y.codes if isinstance(y,QTensor) else y
    return f
for nm,k,n,act,o,res_ in (("S qkv",384,1152,None,1,0),("S proj",384,384,None,0,1),("S fc1",384,1536,"gelu",1,0),("S fc2",1536,384,None,0,1),("B fc1",768,3072,"gelu",1,0),("B fc2",3072,768,None,0,1)):
    wf=h(n,k); bf=h(n)
    mk=lambda:(i8(M,k),)+((h(M,n),) if res_ else ())
    base=bench(lambda x,*r:torch.addmm(bf,x,wf.t()),lambda:(h(M,k),))
    def full(x,*r):
        y=torch.addmm(bf,x,wf.t())
        if act: y=F.gelu(y)
        return y+r[0] if r else y
    basef=bench(full,lambda:(h(M,k),)+((h(M,n),) if res_ else ()))
    wi=i8(n,k)
    im=bench(lambda x:torch._int_mm(x,wi.t()),lambda:(i8(M,k),))
    show(nm+" fp16",("addmm",base),("addmm+act/res",basef),("_int_mm alone",im))
    kk,p=lin(n,k,act,out8() if o else None)
    res=[]
    for mb in (8,16,24,32,48,10000):
        K.ACCUMULATOR_BYTES=mb<<20; res.append((f"{mb}MB",bench(run_lin(kk,p),mk)))
    K.ACCUMULATOR_BYTES=24<<20
    show(nm+" int8",*res)
    res=[]
    if nm[0]=="S":
        for t in ((8,128,4),(32,128,4),(16,128,8),(8,256,4),(16,64,4),(4,128,2),(32,128,8)):
            E.TILE=t; res.append((str(t),bench(run_lin(kk,p),mk)))
        E.TILE=(16,128,4)
        show(nm+" int8 epilogue tile @24MB",*res)
        kd,pd=lin(n,k,act,out8() if o else None,dyn=True)
        k4,p4=lin(n,k,act,out8() if o else None,bits=4)
        kf,pf=lin(n,k,act,None)
        row=lambda:mk()+(torch.rand(M,1,device=dev),)
        show(nm+" variants",("dynamic",bench(run_lin(kd,pd,True),row)),("w4",bench(run_lin(k4,p4),mk)),("fp16 out",bench(run_lin(kf,pf),mk)))
# attention
for B,N,H,D,withbias in ((200,197,6,64,False),(200,197,12,64,False),(200,197,3,64,False),(12800,49,3,32,True)):
    def fset():
        q=h(B,N,3,H,D).permute(2,0,3,1,4); return tuple(q.unbind(0))
    base=bench(lambda q,k,v:F.scaled_dot_product_attention(q,k,v),fset)
    fm=st(s=.03)
    bias=torch.randn(H,N,N,device=dev) if withbias else None; mask=torch.randn(64,N,N,device=dev) if withbias else None
    ak=K.TritonAttention(); mk=lambda:tuple(i8(B,N,3,H,D).unbind(2))
    res=[("sdpa fp16",base)]
    cfgs=((64,256,4),(128,256,8),(64,64,4),(128,64,8),(64,32,4),(128,32,8),(128,128,8)) if N==197 else ((64,64,4),(64,64,2),(32,64,4),(64,64,8))
    old=A.tile
    for c in cfgs:
        A.tile=lambda n,m,c=c:c
        p=ak.pack(AttentionSpec(AttentionParams(fm,fm,fm,8),H,D,D**-.5,out8()),dev)
        res.append((str(c),bench(lambda q,k,v:ak.run(p,q,k,v,dtype=torch.float16,bias=bias,mask=mask).codes,mk)))
    A.tile=old
    p=ak.pack(AttentionSpec(AttentionParams(fm,fm,fm,8),H,D,D**-.5,None),dev)
    res.append(("default fp16 out",bench(lambda q,k,v:ak.run(p,q,k,v,dtype=torch.float16,bias=bias,mask=mask),mk)))
    fz=st(s=.03,z=7)
    p=ak.pack(AttentionSpec(AttentionParams(fz,fz,fz,8),H,D,D**-.5,out8()),dev)
    res.append(("default zp",bench(lambda q,k,v:ak.run(p,q,k,v,dtype=torch.float16,bias=bias,mask=mask).codes,mk)))
    show(f"attention B{B} N{N} H{H} D{D} bias{withbias}",*res)
p=ak.pack(AttentionSpec(AttentionParams(fm,fm,fm,8),6,64,64**-.5,out8()),dev)
h_=A._attention
q,k,v=i8(200,197,3,6,64).unbind(2)
try:
    ck=A._attention.warmup
    cache=list(A._attention.device_caches.values())[0][0]
    for c in cache.values():
        s=c.asm["ptx"]; print("attn kernel regs",c.n_regs,"spills",c.n_spills,"wgmma",s.count("wgmma.mma_async"),"mma.sync",s.count("mma.sync"),c.metadata.num_warps)
except Exception as e: print("introspection",type(e).__name__,e)
