"""The package behind the three exercises. They hold the lesson's own code; here is the rest.

model          the U-Net and the diffusion process; `python -m ddpm_basics.model export FILE`
weight_files   read and written: what they must contain
export         weights for other tools: safetensors and ONNX
sampling       noise levels, lists of times, the guess of x_0, three step rules
steering       half-noised starts, kept regions, pulls, cloth without seams; the perfect memory
training       one step: random numbers, loss weights, learning rate, average of the weights, norms
data           the training images: drawn where they are missing, looked through, read
runs           a training run: its state, the settings it leaves on the disk, its final weights
checkpoints    write, find and resume the checkpoints of a run
trackers       send the rows of losses.csv and the samples to TensorBoard or Weights & Biases
losses         shown while it trains, kept in losses.csv, drawn as a curve
interrupts     Ctrl-C and SIGTERM while training
sample_folder  single images, all of one setting
datasets       data sets with a name: fetched once, read as a folder would be
images         the one decoder, the one folder reader, tilings, films
figures        how figures look: axes, captions, layout
hardware       device, precision, memory that is kept
options        the tables of options
files          a whole file or none
labs           the check below each gap of the notebooks in docs/labs/
console        option types, one-sentence errors, durations
fabrics        the data set: `python -m ddpm_basics.fabrics` draws it, or prepares photographs
evaluation     distances, copies, shares: `python -m ddpm_basics.evaluation FOLDER`
"""
