"""What a run reads under ``train`` (gn_detect.engine.lazy_config, gn_detect.engine.lazy); the keys
are Detectron2's where it has them."""

train = dict(
    output_dir="./output",
    # Weights to start from: a path, a URL, catalog://... or "" for random ones.
    init_checkpoint="",
    max_iter=90000,
    seed=-1,  # negative: another one in each run
    device="cuda",  # the CPU where there is no CUDA
    amp=dict(enabled=False, dtype="float16"),  # or "bfloat16"
    # optimizer.lr, max_iter and the periods are stated for this many images per iteration.
    reference_batch_size=16,
    # Images of a forward pass of one GPU. If it is positive, dataloader.train.total_batch_size and
    # the recipe follow from it by the linear rule (gn_detect/solver/schedule.py).
    ims_per_gpu=0,
    # Forward passes whose gradients are averaged into one iteration; total_batch_size counts the
    # images of all of them. "auto", with ims_per_gpu: as many as restore the reference batch.
    accumulate_steps=None,
    # Of DistributedDataParallel.
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=False),
    # A checkpoint every so many iterations; the newest of them are kept (0: all).
    checkpointer=dict(period=5000, max_to_keep=100),
    eval_period=0,  # iterations; 0: evaluate after the last one alone
    log_period=20,
    # GUARDS of gn_detect/config.py, in small letters: few_images=False lets few images pass.
    guards=dict(),
)
