from .mask_rcnn_R_50_FPN_gn_3x import dataloader, lr_multiplier, model, optimizer, train

# timm's, and as they were trained: RGB, and torchvision's mean and deviation
train.init_checkpoint = "timm://resnet50_gn.a1h_in1k"
model.input_format = dataloader.train.mapper.image_format = "RGB"
model.pixel_mean, model.pixel_std = [123.675, 116.280, 103.530], [58.395, 57.120, 57.375]
