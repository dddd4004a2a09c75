"""Images for calibration and evaluation: where they come from, and as batches of a network."""

from proxyq.data.data import Data as Data
from proxyq.data.data import LazyImages as LazyImages
from proxyq.data.data import balanced_order as balanced_order
from proxyq.data.data import check_labels as check_labels
from proxyq.data.data import sample as sample
from proxyq.data.load import load_data as load_data
from proxyq.data.load import random_images as random_images
from proxyq.data.preprocess import Batch as Batch
from proxyq.data.preprocess import batches as batches
from proxyq.data.preprocess import check_fits as check_fits
from proxyq.data.preprocess import image_shape as image_shape
from proxyq.data.preprocess import model_batches as model_batches
from proxyq.data.preprocess import model_inputs as model_inputs
from proxyq.data.preprocess import prepare as prepare
